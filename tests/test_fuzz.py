"""Damaged and hostile files: a reader returns, or raises an error of modsurg. `make fuzz` goes on for half an hour."""

from random import Random

import pytest
from fuzz.readers import READERS

ROUNDS = 80


@pytest.mark.parametrize("name", READERS)
def test_valid_files_are_read(name):
    for seed in READERS[name].seeds():
        READERS[name](seed)


@pytest.mark.parametrize("name", READERS)
def test_changed_files_give_an_error_of_ours_or_none(name):
    reader, random = READERS[name], Random(0)
    seeds = reader.seeds()
    for number in range(ROUNDS):
        data = reader.mutate(seeds[number % len(seeds)], random)
        if random.randrange(2):
            data = reader.mutate(data, random)
        try:
            reader(data)
        except Exception as error:
            error.add_note(f"reader {name!r}, round {number}: {data[:2000]!r}")
            raise
