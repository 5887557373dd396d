"""The split by hash: stable under additions, and every class on both sides."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tessel.train.data.split import held_out

NAMES = st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=40, unique=True)


@given(NAMES, st.floats(0.05, 0.95), st.data())
def test_every_class_of_two_is_on_both_sides(names: list[str], fraction: float, data: st.DataObject) -> None:
    labels = data.draw(st.lists(st.integers(0, 3), min_size=len(names), max_size=len(names)))
    chosen = held_out(names, fraction, labels)
    for label in set(labels):
        members = chosen[np.array(labels) == label]
        if len(members) == 1:
            assert not members[0]
        else:
            assert 0 < members.sum() < len(members)


@given(st.permutations([f"image_{number}.jpg" for number in range(30)]))
def test_order_does_not_matter(names: list[str]) -> None:
    chosen = dict(zip(names, held_out(names, 0.2), strict=True))
    sorted_names = sorted(names)
    assert [chosen[name] for name in sorted_names] == held_out(sorted_names, 0.2).tolist()


def test_new_samples_move_no_other() -> None:
    names = [f"cat/{number}.jpg" for number in range(2000)]
    before = held_out(names[:1000], 0.2)
    after = held_out(names, 0.2)
    assert (after[:1000] == before).all()
    assert 0.17 < after.mean() < 0.23
