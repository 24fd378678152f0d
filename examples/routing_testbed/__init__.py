"""A hidden mixture of experts is learned by a student of the same shape: which routers find the hidden routing?"""
