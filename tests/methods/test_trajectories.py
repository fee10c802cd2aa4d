"""Golden trajectories of the adversarial methods; run as a script to store new ones."""

import pytest

from dkl import methods
from dkl.attacks import PGDSettings, ThreatModel
from tests.methods.conftest import NUM_CLASSES
from tests.methods.trajectories import Trajectory, check, rewrite, tiny_network

THREAT = ThreatModel("Linf", 0.1)
ATTACK = PGDSettings(THREAT, num_steps=3, step_size=0.05, random_start="gaussian")
UNIFORM = PGDSettings(THREAT, 3, 0.05, "uniform", "train")
BATCH_STATISTICS = PGDSettings(THREAT, 3, 0.05, "uniform", "batch-stats")
WEIGHTS = {"mse_weight": 4.0, "ce_weight": 2.0, "weight_temperature": 2.0}


def ramp(epoch: int, num_epochs: int) -> PGDSettings:
    """Return two steps of the whole radius, which grows over training (ACAT)."""
    eps = 0.1 * (epoch + 1) / num_epochs
    return PGDSettings(ThreatModel("Linf", eps), 2, eps, "gaussian")


TRAJECTORIES = {
    "pgd_at": Trajectory(lambda: methods.pgd_at(UNIFORM)),
    "trades": Trajectory(lambda: methods.trades(ATTACK, beta=6.0)),
    "mart": Trajectory(lambda: methods.mart(ATTACK, beta=5.0)),
    "lbgat": Trajectory(lambda: methods.lbgat(ATTACK, tiny_network(0.5), beta=3.0), awp=0.01),
    "acat": Trajectory(
        lambda: methods.trades(ramp, beta=5.0, label_smoothing=0.125, smooth_direction=False),
        awp=0.01,
    ),
    "dm_at": Trajectory(
        lambda: methods.trades(BATCH_STATISTICS, beta=5.0, label_smoothing=0.1, clean_first=True)
    ),
    "ikl_at": Trajectory(lambda: methods.ikl_at(ATTACK, NUM_CLASSES, **WEIGHTS), awp=0.005),
    "gkl_at": Trajectory(lambda: methods.ikl_at(ATTACK, NUM_CLASSES, gamma=0.4, **WEIGHTS)),
    "ikl_at_two_views": Trajectory(
        lambda: methods.ikl_at(ATTACK, NUM_CLASSES, second_view_weight=0.3, **WEIGHTS), num_views=1
    ),
    "ikl_at_mixed_labels": Trajectory(
        lambda: methods.ikl_at(ATTACK, NUM_CLASSES, **WEIGHTS), mixed_labels=True
    ),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_twenty_steps_are_the_stored_ones(name):
    check(name, TRAJECTORIES[name])


if __name__ == "__main__":
    rewrite(TRAJECTORIES, __spec__.name)
