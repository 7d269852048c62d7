"""Random lives of random models, for as long as one likes: no wrong weight, and nothing that piles up."""

import gc
import os
import threading
import time
from pathlib import Path
from random import Random

import pytest
import torch
from lives import Life

pytestmark = pytest.mark.filterwarnings("ignore::modsurg.errors.ModsurgWarning")
SECONDS = int(os.environ.get("MODSURG_SOAK_SECONDS", "600"))
ROUNDS = 40
AT_MOST = 48 << 20


def held():
    """Resident bytes, open files and threads of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), threading.active_count()


def live(seed, folder, rounds=ROUNDS, **options):
    """One life; when something is wrong with it, the seed is told."""
    folder.mkdir(exist_ok=True)
    random = Random(seed)
    life = Life(random, folder)
    try:
        for _ in range(rounds):
            life.happen(**options)
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise
    left = {path.name for path in folder.iterdir()}
    assert not [name for name in left if "saving" in name or name.startswith(".")], left


@pytest.mark.parametrize("seed", range(4))
def test_random_lives(seed, tmp_path):
    torch.manual_seed(seed)
    live(seed, tmp_path)


def test_eight_threads_with_models_and_files_of_their_own(tmp_path):
    failed = []

    def one(seed):
        try:
            live(seed, tmp_path / str(seed), kills=False)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory and files are counted under /proc")
def test_an_hours_worth_of_lives(tmp_path):
    end, seed = time.monotonic() + SECONDS, 100
    while seed < 120 or time.monotonic() < end:
        live(seed, tmp_path)
        seed += 1
        if seed == 120:
            memory, files, threads = held()
    now = held()
    print(f"{(seed - 100) * ROUNDS:,} happenings in {SECONDS} s: {now[0] - memory:+,} bytes, {now[1] - files:+} files")
    assert now[0] - memory < AT_MOST
    assert now[1:] == (files, threads)
