"""What the times of a round have to do with each other."""

from __future__ import annotations

import pytest

from tests.unit.consumers.machines import Driver, plan_of
from weightbus.consumers.errors import PlanError
from weightbus.consumers.round import instructions as do
from weightbus.consumers.round.config import RoundConfig
from weightbus.schemas.rounds import Budgets, Join


def config(**settings: object) -> RoundConfig:
    return Driver(**settings).config


@pytest.mark.parametrize("join_window_s", [0.0, 0.2, 10.0, 60.0])
@pytest.mark.parametrize("round_ttl_s", [1.0, 3.0, 30.0])
def test_engine_outwaits_a_leader_that_dies_whatever_is_configured(
    join_window_s: float, round_ttl_s: float
) -> None:
    settings = config(join_window_s=join_window_s, round_ttl_s=round_ttl_s)
    dead_leader_s = join_window_s + 2 * round_ttl_s
    assert settings.negotiate_s > dead_leader_s + join_window_s
    assert settings.replan_s > 2 * round_ttl_s + settings.regroup_s


def test_plan_is_still_waited_for_when_the_join_window_is_long() -> None:
    driver = Driver(join_window_s=60.0).start().joined(1)
    assert driver.last(do.SetTimer, "negotiate").at_ns - driver.now_ns > 60 * 10**9
    driver.planned(plan_of(1, {"a": "local"}))
    assert not driver.last(do.Transfer).late
    assert len(driver.said(Join)) == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"join_window_s": -1.0}, "join_window_s is -1.0: must be at least 0"),
        ({"repeat_s": 2.0}, "repeat_max_s is 1.0: must be at least 2"),
        ({"round_ttl_s": 0.0}, "round_ttl_s is 0.0"),
        ({"round_ttl_s": float("nan")}, "round_ttl_s is nan"),
        ({"backoff_s": 60.0}, "backoff_max_s is 30.0: must be at least 60"),
        ({"max_attempts": 0}, "max_attempts is 0: must be at least 1"),
        ({"budgets": Budgets(transfer_s=300.0)}, "round_s is 180.0: must be at least 300"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configuration_is_refused_when_its_times_contradict(
    settings: dict[str, object], reason: str
) -> None:
    with pytest.raises(PlanError, match=reason):
        config(**settings)
