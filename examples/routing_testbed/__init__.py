"""A hidden mixture of experts with a known router is learned by a student of the same shape: which routers can learn?"""
