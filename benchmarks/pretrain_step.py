"""How long is one pretraining step, ours and each installed peer's, in one run?

    python -m benchmarks.pretrain_step                                     Base, 4 x 10 s, fp32, on the CPU
    python -m benchmarks.pretrain_step --peers torchaudio --repeats 3 --json
    python -m benchmarks.pretrain_step --device cuda --dtype bfloat16 --batch 8 --seconds 10.9 --compile

A step is forward, masked-prediction loss, backward and fused AdamW, on equal random crops with about 55 % of the frames
masked, dropout and LayerDrop as the paper trains the size. Each system lives in a process of its own, and they step in
turn, so that a slow moment of the machine meets all of them alike; figures are medians, ratios are medians of the ratios of
neighbours. Our training workers ask torch for huge pages (`distributed/cluster.py`), so ours has them here and peers do not,
unless `--huge-pages all` says so. bf16 means autocast over fp32 weights for all; our training keeps bf16 weights beside fp32 ones.

Peers are not dependencies; whichever can be imported is measured:
    torchaudio        its HuBERTPretrainModel
    transformers      HubertModel under our head and loss (it has no pretraining head of its own)
    minimal_hubert    its HuBERTPretrain, as it is and compiled as its trainer compiles it (dynamic=True)

FLOPs are those of the layers as the paper defines them, two per multiplication with addition, backward counted as twice the
forward pass (less what has no input gradient), LayerDrop ignored. So an FFT in place of a convolution raises the share of
the peak and not the count.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn

from hubert_ray.config.recipe import Pretrain
from hubert_ray.config.sizes import SIZES, ModelSize
from hubert_ray.data.frames import CONV_KERNELS, CONV_STRIDES, SAMPLE_RATE, frames_of, samples_of
from hubert_ray.model.hubert import Hubert
from hubert_ray.model.loss import pretrain_loss
from hubert_ray.model.masking import batch_mask

SETTINGS = Pretrain(steps=1, peak_lr=5e-4)
Loss = Callable[[], Tensor]  # forward pass to the loss, in nats per masked frame


class Batch:
    """One micro-batch of random audio and labels; every system gets the same."""

    def __init__(self, size: int, seconds: float, classes: int, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.frames = frames_of(round(seconds * SAMPLE_RATE))
        samples = samples_of(self.frames)
        self.seconds = size * samples / SAMPLE_RATE
        self.wave_BS = (0.1 * torch.randn(size, samples, generator=generator)).to(device)
        self.labels_BT = torch.randint(classes, (size, self.frames), generator=generator)
        self.mask_BT = batch_mask(size, self.frames, SETTINGS.mask, 0, 0, 0)
        self.device = device


class System:
    """A model with its optimiser."""

    def __init__(self, name: str, model: nn.Module, loss: Loss, batch: Batch, dtype: torch.dtype):
        self.name = name
        self._loss = loss
        self._autocast = partial(torch.autocast, batch.device.type, dtype=dtype, enabled=dtype != torch.float32)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6, fused=True)
        self._device = batch.device

    def step(self) -> float:
        """One training step; returns its seconds."""
        _wait(self._device)
        begun = time.perf_counter()
        with self._autocast():
            loss = self._loss()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        _wait(self._device)
        seconds = time.perf_counter() - begun
        assert torch.isfinite(loss), f"{self.name}: the loss is not finite"
        return seconds


def ours(size: ModelSize, classes: int, batch: Batch, compiled: bool, recompute: bool) -> tuple[nn.Module, Loss]:
    """Our model and loss, as `stages/pretrain.py` trains them."""
    model = Hubert(size, (classes,)).to(batch.device).train()
    model.encoder.recompute_layers = recompute
    run = torch.compile(model, dynamic=False) if compiled else model

    def loss() -> Tensor:
        output = run(batch.wave_BS, batch.mask_BT)
        parts = pretrain_loss(model, output, batch.labels_BT, batch.mask_BT, SETTINGS)
        return parts.total / parts.frames

    return model, loss


def torchaudio(name: str, size: ModelSize, classes: int, batch: Batch) -> tuple[nn.Module, Loss]:
    from torchaudio.models import hubert_pretrain_base, hubert_pretrain_large, hubert_pretrain_xlarge

    build = {"base": hubert_pretrain_base, "large": hubert_pretrain_large, "xlarge": hubert_pretrain_xlarge}[name]
    model = build(num_classes=classes).to(batch.device).train()
    labels_BT = batch.labels_BT.to(batch.device)

    def loss() -> Tensor:  # it draws its own mask; labels only choose the positive row
        logits_NC, _, penalty = model(batch.wave_BS, labels_BT)
        return -logits_NC.log_softmax(1)[:, 0].mean() + 10 * penalty

    return model, loss


def transformers(name: str, size: ModelSize, classes: int, batch: Batch) -> tuple[nn.Module, Loss]:
    from transformers import HubertConfig, HubertModel

    config = HubertConfig(
        hidden_size=size.dim,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.ffn_dim,
        conv_bias=False,
        feat_extract_norm=size.conv_norm,
        do_stable_layer_norm=size.norm_first,
        hidden_dropout=size.dropout,
        attention_dropout=size.attention_dropout,
        activation_dropout=size.activation_dropout,
        feat_proj_dropout=size.input_dropout,
        layerdrop=size.layer_drop,
    )
    model = HubertModel(config)
    head = model.head = Hubert(size, (classes,)).head
    nn.Module.to(model, batch.device).train()
    mask_BT, labels_BT = batch.mask_BT.to(batch.device), batch.labels_BT.to(batch.device)

    def loss() -> Tensor:
        hidden_BTD = model(batch.wave_BS, mask_time_indices=mask_BT).last_hidden_state
        return nn.functional.cross_entropy(head.logits(hidden_BTD[mask_BT]), labels_BT[mask_BT])

    return model, loss


def minimal_hubert(name: str, size: ModelSize, classes: int, batch: Batch, compiled: bool) -> tuple[nn.Module, Loss]:
    from minimal_hubert.model import HuBERTPretrain

    model = HuBERTPretrain(classes, size=name).to(batch.device).train()
    if compiled:
        model.compile(dynamic=True)
    mask_BT, labels_BT = batch.mask_BT.to(batch.device), batch.labels_BT.to(batch.device)

    def loss() -> Tensor:
        return model(batch.wave_BS, labels_BT, mask=mask_BT, attention_mask=None)[0].mean()

    return model, loss


PEERS: dict[str, tuple[str, Callable[..., tuple[nn.Module, Loss]]]] = {  # name -> (package, builder)
    "torchaudio": ("torchaudio", torchaudio),
    "transformers": ("transformers", transformers),
    "minimal_hubert": ("minimal_hubert", partial(minimal_hubert, compiled=False)),
    "minimal_hubert_compiled": ("minimal_hubert", partial(minimal_hubert, compiled=True)),
}


def gflop_per_audio_second(size: ModelSize, frames: int, classes: int, masked_share: float) -> float:
    """Of one training step over crops of `frames` frames; see the module docstring for what is counted."""
    steps, inputs, conv = samples_of(frames), 1, []
    for kernel, stride in zip(CONV_KERNELS, CONV_STRIDES, strict=True):
        steps = (steps - kernel) // stride + 1
        conv.append(2 * steps * inputs * size.conv_channels * kernel)
        inputs = size.conv_channels
    dim, block = size.dim, 0
    block += 2 * frames * dim * 4 * dim  # q, k, v and output projections
    block += 2 * 2 * frames * frames * dim  # scores, and values mixed by them
    block += 2 * 2 * frames * dim * size.ffn_dim
    position = 2 * frames * dim * (dim // size.position_groups) * size.position_kernel
    projection = 2 * frames * size.conv_channels * dim
    head = 2 * masked_share * frames * size.codeword_dim * (dim + classes)
    forward = sum(conv) + projection + position + size.layers * block + head
    backward = 2 * forward - conv[0]  # nothing asks for the gradient of the waveform
    return (forward + backward) / 1e9 / (samples_of(frames) / SAMPLE_RATE)


def matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """What the device reaches in one large matrix product: the peak that shares are of."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    best = float("inf")
    for _ in range(8):
        _wait(device)
        begun = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _serve(connection: Connection, name: str, options: argparse.Namespace) -> None:
    """The process of one system: a step for every True received, then its peak of GPU memory."""
    device, size = torch.device(options.device), SIZES[options.size]
    batch = Batch(options.batch, options.seconds, options.classes, device)
    torch.manual_seed(0)
    if name == "ours":
        parts = ours(size, options.classes, batch, options.compile, options.recompute)
    else:
        parts = PEERS[name][1](options.size, size, options.classes, batch)
    system = System(name, *parts, batch, getattr(torch, options.dtype))
    while connection.recv():
        connection.send(system.step())
    connection.send(torch.cuda.max_memory_allocated() if device.type == "cuda" else None)


class Turn:
    """A system in its process."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.name = name
        if options.huge_pages == "all" or (options.huge_pages, name) == ("ours", "ours"):
            os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # torch reads it at its first large allocation
        else:
            os.environ.pop("THP_MEM_ALLOC_ENABLE", None)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, options), daemon=True)
        self._process.start()
        theirs.close()

    def step(self) -> float:
        self._connection.send(True)
        return self._connection.recv()

    def finish(self) -> int | None:
        """Ends the process; most GPU memory in bytes, or None on a CPU."""
        self._connection.send(False)
        peak = self._connection.recv()
        self._process.join()
        return peak


def measure(options: argparse.Namespace) -> dict:
    """Every figure of one run."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    size = SIZES[options.size]
    batch = Batch(options.batch, options.seconds, options.classes, torch.device("cpu"))
    asked = PEERS if options.peers == "all" else [peer for peer in options.peers.split(",") if peer not in ("", "none")]
    if unknown := set(asked) - set(PEERS):
        raise SystemExit(f"--peers: found {', '.join(sorted(unknown))}, expected some of {', '.join(PEERS)}")
    peers = [peer for peer in asked if size.conv_channels == 512 and importlib.util.find_spec(PEERS[peer][0])]
    turns = [Turn(name, options) for name in ("ours", *peers)]
    seconds: dict[str, list[float]] = {turn.name: [] for turn in turns}
    peak = 0.0
    for _ in range(options.warmup + options.repeats):
        peak = max(peak, matmul_gflops(device, dtype))
        for turn in turns:
            seconds[turn.name].append(turn.step())
    seconds = {name: steps[options.warmup :] for name, steps in seconds.items()}
    memory = {turn.name: turn.finish() for turn in turns}
    share = batch.mask_BT.float().mean().item()
    gflop = gflop_per_audio_second(size, batch.frames, options.classes, share)

    def figures(name: str) -> dict:
        rate = batch.seconds / statistics.median(seconds[name])
        result = {
            "audio_seconds_per_second": round(rate, 3),
            "step_seconds": round(statistics.median(seconds[name]), 4),
            "share_of_matmul_peak": round(rate * gflop / peak, 3),
        }
        if name != "ours":
            ratios = [theirs / mine for theirs, mine in zip(seconds[name], seconds["ours"], strict=True)]
            result["ours_is_faster_by"] = round(statistics.median(ratios), 3)
        return result

    result = {
        "size": options.size,
        "batch": options.batch,
        "frames": batch.frames,
        "audio_seconds": batch.seconds,
        "classes": options.classes,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "dtype": options.dtype,
        "torch": torch.__version__,
        "compiled": options.compile,
        "huge_pages": options.huge_pages,
        "repeats": options.repeats,
        "ours": figures("ours"),
        "peers": {peer: figures(peer) for peer in peers},
        "sgemm_gflops": round(peak, 1),
        "gflop_per_audio_second": round(gflop, 2),
    }
    if memory["ours"] is not None:
        result["peak_memory_gib"] = round(memory["ours"] / 2**30, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrain_step", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, default=4, help="crops")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a crop")
    parser.add_argument("--classes", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="compile our model")
    parser.add_argument(
        "--recompute", action="store_true", help="recompute our blocks' activations in the backward pass"
    )
    parser.add_argument("--peers", default="all", help=f"all, none, or some of {','.join(PEERS)}")
    parser.add_argument("--huge-pages", choices=("ours", "all", "none"), default="ours", help="who asks torch for them")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if min(options.batch, options.classes - 1, options.repeats, options.warmup + 1) < 1 or options.seconds < 0.5:
        parser.error("expected --batch, --repeats from 1, --classes from 2, --warmup from 0, --seconds from 0.5")
    result = measure(options)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{result['size']}, {result['batch']} x {result['frames']} frames, {result['dtype']}, {result['device']}")
    print(
        f"{result['gflop_per_audio_second']} GFLOP per audio second; matrix products {result['sgemm_gflops']} GFLOP/s"
    )
    for name, row in {"ours": result["ours"], **result["peers"]}.items():
        ratio = f"  ours is {row['ours_is_faster_by']:.2f}x" if name != "ours" else ""
        print(
            f"{name:24} {row['audio_seconds_per_second']:10.2f} audio-s/s  {row['step_seconds']:8.3f} s a step  "
            f"{100 * row['share_of_matmul_peak']:5.1f} % of the peak{ratio}"
        )


if __name__ == "__main__":
    main()
