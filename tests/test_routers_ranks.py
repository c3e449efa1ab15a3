"""Balance losses and their gradients on 2 and 4 gloo processes are those of one: statistics are of the global batch."""

import multiprocessing

import pytest
import torch
from torch import distributed

from prismoe import registry
from prismoe.train.routers import Moment, arguments_of, attach_policy
from prismoe.train.routing import watch
from tests.policies import HIDDEN, stock

TOKENS = 48
POLICIES = registry.names("prismoe.train.routers")


class Sum(torch.autograd.Function):
    """What the seam asks of `all_reduce`: the sum over processes, in both directions."""

    @staticmethod
    def forward(context, tensor):
        total = tensor.detach().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context, gradient):
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


def outcome(name, rank, world):
    """Loss, metrics, summed gradients of routers and noise, and the state after a step, in one flat list."""
    generator = torch.Generator().manual_seed(3)
    hidden_TD = torch.randn(TOKENS, HIDDEN, generator=generator)
    rows = slice(rank * TOKENS // world, (rank + 1) * TOKENS // world)
    with watch(stock()) as routers:
        arguments = {"drop": "random"} if name == "capacity" else {}
        all_reduce = Sum.apply if world > 1 else lambda tensor: tensor
        policy = attach_policy(name, routers, arguments=arguments_of(name, arguments), all_reduce=all_reduce)
        policy.begin(Moment(0, 0, torch.arange(TOKENS)[rows], 12))
        outputs = [router.module(hidden_TD[rows]) for router in routers]
        loss = policy.loss()
        text = sum((output[1] * torch.arange(1.0, 3.0)).sum() for output in outputs) / TOKENS
        (text + loss / world).backward()  # as the trainer: each process has its share of the tokens
        parameters = [*(router.module.weight for router in routers), *policy.parameters().values()]
        for parameter in parameters:
            if world > 1:
                distributed.all_reduce(parameter.grad)
        policy.after_step()
        found = [loss.detach().reshape(1), torch.tensor([*policy.metrics().values()])]
        found += [parameter.grad.flatten() for parameter in parameters]
        found += [bias.flatten() for bias in policy.state().values()]
    return torch.cat(found).tolist()


def work(rank, world, store, pipe):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results = {name: outcome(name, rank, world) for name in POLICIES}
    distributed.barrier()
    distributed.destroy_process_group()
    pipe.send(results)
    pipe.close()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_with_one_process(tmp_path, world):
    fork = multiprocessing.get_context("fork")  # the children have all that is imported here
    expected = {name: outcome(name, 0, 1) for name in POLICIES}
    pipes, children = [], []
    for rank in range(world):
        here, there = fork.Pipe(duplex=False)
        child = fork.Process(target=work, args=(rank, world, tmp_path / "store", there), daemon=True)
        child.start()
        pipes.append(here)
        children.append(child)
    for here in pipes:
        assert here.poll(120), "a process did not answer"
        found = here.recv()
        for name in POLICIES:
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    for child in children:
        child.join(30)
