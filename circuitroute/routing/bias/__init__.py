"""What the rules of :mod:`circuitroute.routing.balance` compute: the bias that balances a batch, exactly.

``solver`` finds the bias of given mean marginals by Newton, ``targets`` says which there are, and ``needed`` has the
bias at which a token's most probable subset takes another expert, with its quantiles.
"""
