"""Which process holds which part of a model: FSDP2 over a copy, copies side by side, experts whole where asked."""

from __future__ import annotations

from typing import Any

import torch

from prismoe.errors import UsageError
from prismoe.train.engine import Engine

__all__ = ["gather_no_more", "materialise", "place"]


def place(model: Any, engine: Engine, *, bf16: bool = False) -> Any:
    """Shard `model` (on the meta device or with weights) over the processes of `engine`; alone it stays whole.

    Gradients are sums over processes, in float32, and the loss is divided by the tokens of all of them beforehand: the
    divide factor is 1 and the reduction a plain SUM. (PREMUL_SUM, which another factor would take, is unknown to gloo
    and zeroed bfloat16 gradients in NCCL up to torch 2.13, pytorch issue 190745.) `bf16` gathers weights in bfloat16
    for the computation on a device; on a CPU autocast does that.

    Raises:
        UsageError: the class has no plan for expert parallelism.
    """
    if engine.world == 1 and engine.device.type == "cpu":
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    layout, kind = engine.layout, engine.device.type
    shape = (layout.replicate, layout.shard)
    dense = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    dense = dense if layout.replicate > 1 else dense["shard"]
    options: dict[str, Any] = {"shard_placement_fn": lambda parameter: Shard(layout.axis(parameter.shape))}
    if bf16 and kind != "cpu":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if layout.experts > 1:
        apart = (layout.replicate, layout.shard // layout.experts, layout.experts)
        mesh = init_device_mesh(kind, apart, mesh_dim_names=("replicate", "efsdp", "experts"))
        experts = _share_out_experts(model, mesh)
        between = mesh["replicate", "efsdp"] if layout.replicate > 1 else mesh["efsdp"]
        for module in experts:
            fully_shard(module, mesh=between, **options)
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=dense, **options)
    fully_shard(model, mesh=dense, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def _share_out_experts(model: Any, mesh: Any) -> list[Any]:
    """transformers' expert parallelism: whole experts on each process, tokens sent by all-to-all."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    found = [name for name, module in model.named_modules() if hasattr(module, "gate_up_proj")]
    if not found:
        raise UsageError(
            "experts that are not fused", where=str(model.config.model_type), needed="pretrain.expert_parallel=1"
        )
    plan: dict[str, str] = {}
    for name in found:
        plan |= {f"{name}.gate_up_proj": "grouped_gemm", f"{name}.down_proj": "grouped_gemm"}
        plan[name] = "ep_dispatch_experts"
    alone = init_device_mesh(mesh.device_type, (mesh.size(), 1), mesh_dim_names=("others", "tensor"))["tensor"]
    apply_expert_parallelism(model, mesh["experts"], alone, plan, ep_implementation="all_to_all")
    return [model.get_submodule(name) for name in found]


def gather_no_more(model: Any) -> None:
    """Let go of the weights that a forward pass without a backward pass has left whole; nothing for a whole model.

    Until then a module's parameters are not those that the optimizer knows.
    """
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def materialise(model: Any, device: torch.device) -> Any:
    """Give a placed model of the meta device its memory; weights are then whatever was there, buffers are right."""
    model.to_empty(device=device)
    model.tie_weights()
    for module in model.modules():
        own = dict(module.named_buffers(recurse=False))
        if own and not any(True for _ in module.parameters(recurse=False)):
            # Rotary tables: computed from the config alone, in no folder.
            with torch.device(device):
                fresh = dict(type(module)(module.config).named_buffers(recurse=False))
            for name, buffer in own.items():
                buffer.copy_(fresh[name])
    return model
