"""Groups that do not meet are tried less and less often, and never given up."""

from __future__ import annotations

from itertools import pairwise

from weightbus.consumers.transfer.favour import MAX_LEFT_OUT, Favour


def tried(favour: Favour, versions: range) -> list[int]:
    """The versions for which a group is tried, if none ever meets."""
    found = []
    for version in versions:
        if favour.allows(version):
            found.append(version)
            favour.missed(version)
    return found


def test_pauses_double_up_to_a_bound_when_no_group_ever_meets() -> None:
    versions = tried(Favour(), range(400))
    pauses = [later - earlier - 1 for earlier, later in pairwise(versions)]
    assert pauses == [2, 4, 8, 16, 32, *[MAX_LEFT_OUT] * 5]


def test_version_counts_once_however_often_it_is_asked_for_or_missed() -> None:
    favour = Favour()
    assert [favour.missed(5), favour.missed(5)] == [2, 2]
    answers = [favour.allows(version) for version in (5, 70, 70, 5, 80, 70, 80, 90, 90)]
    assert answers == [False] * 7 + [True] * 2


def test_all_is_forgotten_when_a_group_meets() -> None:
    favour = Favour()
    assert tried(favour, range(4)) == [0, 3]
    favour.met()
    assert favour.allows(4)
    assert favour.missed(4) == 2
