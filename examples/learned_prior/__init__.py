"""A learned prior over the routing decisions of the demo's language model: how many bits does a decision take?"""
