"""Two ranks on the CPU: the same masks and the same weights on both, through all phases."""

from __future__ import annotations

import gc
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import resu_compile as resu


def _train(model, optimizer, data, steps):
    for step in range(steps):
        optimizer.zero_grad()
        model(data[step % len(data)]).square().mean().backward()
        optimizer.step()


def _rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 6))
    resu.sparsify(model, 0.6, compile=False)
    ctl = resu.controller(model)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2, weight_decay=0.1)
    torch.manual_seed(100 + rank)  # every rank has data of its own
    data = torch.randn(4, 8, 12)
    _train(parallel, optimizer, data, 4)
    zeros = all((model.get_parameter(n)[~m] == 0).all() for n, m in ctl.masks.items())
    with ctl.resurrect(lr=1e-2, init="normal") as phase:
        _train(parallel, optimizer, data, 4)
    _train(parallel, optimizer, data, 4)
    zeros &= all((model.get_parameter(n)[~m] == 0).all() for n, m in ctl.masks.items())
    torch.save(
        {
            "weights": model.state_dict(),
            "masks": ctl.masks,
            "zeros": bool(zeros),
            "resurrected": phase.report.resurrected,
        },
        f"{folder}/{rank}.pt",
    )
    del parallel, optimizer  # gloo may hang if the group goes before what uses it
    gc.collect()
    dist.destroy_process_group()


def test_ranks_agree(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["zeros"]
    assert second["zeros"]
    assert first["resurrected"] > 0
    for name, mask in first["masks"].items():
        assert torch.equal(mask, second["masks"][name])
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])
