"""Every way to hand a tensor to every public callable: the right value, a refusal in words, or a shape. Nothing else.

``entries`` says what is called, ``columns`` how its argument is given and what is expected, ``judges`` when a cell is
as it should be, ``worker`` runs cells in a process of their own, since what is being looked for may end it.
"""
