"""A run that is stopped says so, wherever the stop came."""

import os
import signal

import pytest
import torch
from torch import nn

from modsurg import Trainer

BATCHES = [(torch.ones(4, 2), torch.ones(4, 1))] * 3


def make(**options):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, optimizer, nn.MSELoss(), progress=False, **options)


class Validation:
    """Batches, in whose n-th pass something happens."""

    def __init__(self, number, happens):
        self.passes, self.number, self.happens = 0, number, happens

    def __iter__(self):
        self.passes += 1
        if self.passes == self.number:
            self.happens()
        yield BATCHES[0]


def stops(trainer):
    yield "SIGINT", lambda: os.kill(os.getpid(), signal.SIGINT)
    yield "SIGTERM", lambda: os.kill(os.getpid(), signal.SIGTERM)
    yield "enough", lambda: trainer.stop("enough")


@pytest.mark.parametrize("how", [0, 1, 2])
@pytest.mark.parametrize("place", ["first validation", "last validation", "on_epoch", "last step", "last window"])
def test_a_stop_is_in_the_history_wherever_it_came(place, how):
    trainer = make(accumulate=2 if place == "last window" else 1)
    reason, stop = list(stops(trainer))[how]
    number = {"first validation": 1, "last validation": 3}.get(place, 0)
    history = (
        trainer.fit(
            BATCHES,
            Validation(number, stop),
            epochs=3,
            on_step=lambda t: stop() if place == "last step" and t.step == 9 else None,
            on_epoch=lambda t: stop() if place == "on_epoch" and t.epoch == 3 else None,
        )
        if place != "last window"
        else trainer.fit(BATCHES, epochs=3, on_step=lambda t: stop() if t.step == 6 else None)
    )
    assert history.stopped == reason
    assert trainer.fit(BATCHES).stopped == ""


def test_a_loop_that_is_left_and_an_error_say_it_too():
    trainer = make()
    for epoch in trainer.epochs(BATCHES, epochs=2):
        for x, y in epoch:
            epoch.step(trainer.loss(trainer.model(x), y))
        trainer.stop("left")
        break
    assert trainer.history.stopped == "left"

    def fails():
        trainer.stop("before an error")
        raise ZeroDivisionError("in the user's loader")

    with pytest.raises(ZeroDivisionError, match="user's loader"):
        trainer.fit(BATCHES, Validation(1, fails))
    assert trainer.history.stopped == "before an error"


def test_patience_that_ends_with_the_last_epoch_stopped_nothing():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(model, optimizer, nn.MSELoss(), progress=False)
    assert trainer.fit(BATCHES, epochs=3, patience=2).stopped == ""
    assert len(trainer.fit(BATCHES, epochs=9, patience=2)) < 12
    assert trainer.history.stopped == "loss did not get better for 2 epochs"
