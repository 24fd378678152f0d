"""Everything built in passes the contract suite that the library hands to others."""

import circuitroute as cr
from circuitroute.testing import Case, CompilerContract
from tests.test_compile import NoNeighbours, Parity


class TestCounts(CompilerContract):
    def cases(self):
        yield Case(cr.Exactly(0), 1, lambda selected: not selected)
        yield Case(cr.Exactly(3), 6, lambda selected: len(selected) == 3)
        yield Case(cr.AtMost(2), 5, lambda selected: len(selected) <= 2)
        yield Case(cr.AtLeast(4), 5, lambda selected: len(selected) >= 4)
        yield Case(cr.Between(1, 3), 5, lambda selected: 1 <= len(selected) <= 3)
        yield Case(cr.CountIn({0, 4}), 6, lambda selected: len(selected) in (0, 4))
        yield Case(cr.AtLeast(0), 3, lambda selected: True)
        yield Case(cr.Exactly(4), 3, lambda selected: False)


class TestScopesAndCosts(CompilerContract):
    def cases(self):
        yield Case(cr.Exactly(1).over([0, 3]), 5, lambda selected: len(selected & {0, 3}) == 1)
        yield Case(cr.Cost([1, 2, 3, 4], at_most=5), 4, lambda selected: sum(v + 1 for v in selected) <= 5)
        yield Case(cr.Cost([3, 0, 2], at_least=3), 3, lambda selected: sum([3, 0, 2][v] for v in selected) >= 3)
        yield Case(cr.Cost([1, 1], at_least=3), 2, lambda selected: False)


class TestGroups(CompilerContract):
    def cases(self):
        odd = cr.Groups([[0, 2], [1, 3, 4]])
        yield Case(cr.EachGroup(odd, cr.Exactly(1)), 5,
                   lambda selected: len(selected & {0, 2}) == 1 == len(selected & {1, 3, 4}))  # fmt: skip
        yield Case(cr.ActiveGroups(cr.Groups(3), at_most=2, at_least=1), 6,
                   lambda selected: 1 <= len({v // 2 for v in selected}) <= 2)  # fmt: skip
        yield Case(cr.LayerBudget(2, 3, per_layer=cr.Between(1, 2), total=cr.AtMost(3)), 6,
                   lambda selected: all(1 <= len(selected & set(layer)) <= 2 for layer in (range(3), range(3, 6)))
                   and len(selected) <= 3)  # fmt: skip


class TestOperators(CompilerContract):
    namespace = {"NoNeighbours": NoNeighbours}  # noqa: RUF012 - the hook is read, never written

    def cases(self):
        pair = cr.Exactly(1).over([1, 2])
        yield Case(cr.AtMost(2) & pair, 5, lambda selected: len(selected) <= 2 and len(selected & {1, 2}) == 1)
        yield Case(cr.Exactly(2) | pair, 4, lambda selected: len(selected) == 2 or len(selected & {1, 2}) == 1)
        yield Case(~pair, 3, lambda selected: len(selected & {1, 2}) != 1)
        yield Case(NoNeighbours() & cr.AtLeast(1), 5, lambda selected: bool(selected) and apart(selected))
        yield Case(cr.AtMost(1) & cr.AtLeast(2), 4, lambda selected: False)


class TestMachines(CompilerContract):
    def cases(self):
        for n in (1, 2, 5):
            yield Case(Parity(), n, lambda selected: len(selected) % 2 == 0)
            yield Case(NoNeighbours(), n, apart)


class TestLogic(CompilerContract):
    @property
    def namespace(self):
        import sympy

        return vars(sympy)

    def cases(self):
        x = cr.variables(4)
        yield Case(cr.Logic(x[0] >> x[2]), 4, lambda selected: 0 not in selected or 2 in selected)
        yield Case(cr.Logic(x[1] ^ x[3]) & cr.AtMost(2), 4,
                   lambda selected: len(selected & {1, 3}) == 1 and len(selected) <= 2)  # fmt: skip


def apart(selected):
    return not any(v + 1 in selected for v in selected)
