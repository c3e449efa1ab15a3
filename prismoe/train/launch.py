"""How a run of many processes is started: lines for torchrun, Slurm and Kubernetes, to be copied and adapted."""

from __future__ import annotations

import json

from prismoe.train.engine.layout import Layout

__all__ = ["launch_lines"]

PER_NODE = 8


def launch_lines(layout: Layout, *, command: str, per_node: int = PER_NODE) -> dict[str, str]:
    """`command` ("pretrain run.yaml") on `layout.world` processes, `per_node` of them on a machine.

    The same line continues a run that was stopped or lost a machine: torchrun starts the processes again and they go
    on from the last checkpoint.
    """
    here = min(layout.world, per_node)
    nodes = -(-layout.world // per_node)
    if nodes == 1:
        torchrun = f"torchrun --standalone --nproc-per-node {here} --max-restarts 3 -m prismoe {command}"
    else:
        torchrun = (
            f"torchrun --nnodes {nodes} --nproc-per-node {here} --max-restarts 3 --rdzv-backend c10d "
            f"--rdzv-id prismoe --rdzv-endpoint $HEAD:29500 -m prismoe {command}"
        )
    return {
        "torchrun": torchrun,
        "slurm": _slurm(torchrun, nodes, here),
        "kubernetes": _kubernetes(torchrun, nodes, here),
    }


def _slurm(torchrun: str, nodes: int, here: int) -> str:
    return "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --nodes={nodes} --ntasks-per-node=1 --gpus-per-node={here} --signal=TERM@120 --requeue",
            'export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f"srun {torchrun}",
        ]
    )


def _kubernetes(torchrun: str, nodes: int, here: int) -> str:
    """An indexed Job, and the headless Service that gives its pods their names."""
    line = torchrun.replace("$HEAD", "prismoe-0.prismoe")
    return "\n".join(
        [
            "apiVersion: v1",
            "kind: Service",
            "metadata: {name: prismoe}",
            "spec: {clusterIP: None, selector: {job-name: prismoe}}",
            "---",
            "apiVersion: batch/v1",
            "kind: Job",
            "metadata: {name: prismoe}",
            "spec:",
            f"  completions: {nodes}",
            f"  parallelism: {nodes}",
            "  completionMode: Indexed",
            "  backoffLimit: 100",
            "  template:",
            "    spec:",
            "      subdomain: prismoe",
            "      restartPolicy: OnFailure",
            "      terminationGracePeriodSeconds: 300",
            "      containers:",
            "        - name: train",
            "          image: prismoe",
            "          workingDir: /runs",
            f"          command: [bash, -c, {json.dumps(line)}]",
            "          resources:",
            f"            limits: {{nvidia.com/gpu: {here}}}",
            "          volumeMounts:",
            "            - {name: runs, mountPath: /runs}",
            "      volumes:",
            "        - {name: runs, persistentVolumeClaim: {claimName: runs}}",
        ]
    )
