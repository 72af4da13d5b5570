"""Learners that average their gradients all hold the mean, in the same bits."""

import os
import socket
import tempfile
import threading

import numpy as np
import pytest
import torch

from dmrl_ray.learn import all_reduce as averaging
from dmrl_ray.learn.all_reduce import SharedMean, gradient_average

RANKS = 3


def shared_means(world_size, capacity):
    """One of each learner, as if each were in a process of its own."""
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, SharedMean.size_of(world_size, capacity))
        return [SharedMean(file.fileno(), r, world_size, capacity) for r in range(world_size)]


def side_by_side(functions):
    answers = [None] * len(functions)

    def run(i):
        answers[i] = functions[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_every_learner_gets_the_mean_however_often_and_however_unequal_their_pace():
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(RANKS, 1 + n % 7, generator=generator) for n in range(200)]

    def learner(rank, mean):
        def run():
            seen = []
            for n, step in enumerate(steps):
                if (n + rank) % 50 == 0:
                    threading.Event().wait(0.002)
                seen.append(mean(step[rank]).clone())
            return seen

        return run

    means = shared_means(RANKS, 7)
    answers = side_by_side([learner(rank, mean) for rank, mean in enumerate(means)])
    for n, step in enumerate(steps):
        for rank in range(RANKS):
            torch.testing.assert_close(answers[rank][n], step.mean(0))
            np.testing.assert_array_equal(answers[rank][n], answers[0][n])


def test_a_learner_that_waits_for_one_that_is_gone_gives_up(monkeypatch):
    monkeypatch.setattr(averaging, "PATIENCE_S", 0.05)
    alone, _ = shared_means(2, 1)
    with pytest.raises(TimeoutError, match=r"another learner within 0\.05 s"):
        alone(torch.ones(1))


def gradients_of(rank, port, answers, folder):
    """In a process: the mean over two learners of gradients that tell their rank."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    average = gradient_average(5, torch.device("cpu"))
    for step in range(3):
        gradient = torch.tensor([rank + step, rank + step, 10.0 * rank])
        answers.put((rank, step, average(gradient).tolist()))
    answers.put((rank, type(average).__name__, os.listdir(folder)))
    torch.distributed.destroy_process_group()


def test_learners_of_one_machine_share_memory_and_leave_no_file():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    arguments = [(rank, port, answers, "/dev/shm") for rank in range(2)]
    learners = [context.Process(target=gradients_of, args=a) for a in arguments]
    for learner in learners:
        learner.start()
    rows = [answers.get(timeout=60) for _ in range(8)]
    for learner in learners:
        learner.join()
    for rank in range(2):
        mine = [row for row in rows if row[0] == rank]
        assert [row[1:] for row in mine[:3]] == [
            (step, [0.5 + step, 0.5 + step, 5.0]) for step in range(3)
        ]
        assert mine[3][1] == "SharedMean"
        assert not [name for name in mine[3][2] if name.startswith("dmrl_ray-")]
