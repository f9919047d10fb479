"""Functions of an object that are replaced for a while come back, in whatever order the replacements end."""

from itertools import permutations

import pytest

from inflection_fast.measure.hooks import patched


class Owner:
    def value(self, at):
        return [at]


def marking(mark):
    return lambda original: lambda *args, **kwargs: [*original(*args, **kwargs), mark]


@pytest.mark.parametrize("order", permutations(range(3)))
@pytest.mark.parametrize("own", [False, True])
def test_replacements_end_in_any_order_and_leave_what_was_there(order, own):
    owner = Owner()
    if own:
        owner.value = lambda at: [-at]
    before, found = dict(vars(owner)), owner.value(7)
    contexts = [patched(owner, "value", marking(mark)) for mark in range(3)]
    for context in contexts:
        context.__enter__()
    active = [0, 1, 2]
    assert owner.value(at=7) == found + active
    for ends in order:
        contexts[ends].__exit__(None, None, None)
        active.remove(ends)
        assert owner.value(7) == found + active
    assert vars(owner) == before


def test_what_somebody_else_puts_on_top_stays():
    owner = Owner()
    with patched(owner, "value", marking(1)):
        ours = owner.value
        owner.value = others = lambda at: [*ours(at), "other"]
    assert owner.value is others and owner.value(7) == [7, "other"]
