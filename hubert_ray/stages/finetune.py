"""a pretrained model + a few transcripts -> a recogniser, by a Ray Tune sweep of CTC fine-tuning.

The same stage trains the control: the network from random weights on the same transcripts, its conv encoder trained too.
Audio is padded and never cropped, because a cropped waveform no longer says its transcript.
HuBERT (Hsu et al. 2021) II-E, IV-D.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from torch import nn

from hubert_ray.asr import letters, wer
from hubert_ray.asr.decoder import greedy
from hubert_ray.asr.transcripts import labelled_subset, read_transcribed, spellable
from hubert_ray.asr.wer import ErrorRate
from hubert_ray.config.recipe import Finetune, Sweep
from hubert_ray.data.batching import PaddedPlan
from hubert_ray.data.collate import Padded, UtteranceReader
from hubert_ray.data.frames import SAMPLE_RATE, frames_of
from hubert_ray.data.shards import AudioReader
from hubert_ray.distributed.sweep import Trial, TrialResult, run_trials
from hubert_ray.distributed.train_loop import StepLoss, TrainJob
from hubert_ray.errors import TrainingError
from hubert_ray.formats.native import ModelCard
from hubert_ray.model.ctc import HubertCtc
from hubert_ray.model.loss import ctc_loss_sum
from hubert_ray.model.masking import FinetuneMask, finetune_mask
from hubert_ray.model.optim import adamw, tri_stage_lr
from hubert_ray.stages.context import ModelAt, Work, model_at
from hubert_ray.storage import layout

TRIALS = "trials.json"
Start = Literal["pretrained", "scratch"]


class Choice(msgspec.Struct, frozen=True):
    """What the sweep varies."""

    peak_lr: float
    freeze_share: float
    mask_prob: float


@dataclass(frozen=True)
class Spelled:
    """A micro-batch of padded utterances with their letters (B, U), letter counts (B,) and input masks."""

    audio: Padded
    letters_BU: torch.Tensor
    counts_B: torch.Tensor
    mask: FinetuneMask

    def to(self, device: torch.device) -> Spelled:
        audio = Padded(self.audio.wave_BS.to(device), self.audio.samples_B)
        return Spelled(audio, self.letters_BU.to(device), self.counts_B, self.mask)


class CtcLoss(nn.Module):
    """The recogniser with its loss, so that ZeRO sees one forward pass."""

    def __init__(self, model: HubertCtc):
        super().__init__()
        self.model = model

    def forward(self, batch: Spelled) -> StepLoss:
        wave_BS = batch.audio.wave_BS.to(self.model.head.weight.dtype)
        log_probs_BTV, frames_B = self.model(wave_BS, batch.audio.samples_B, batch.mask.time_BT, batch.mask.channel_BD)
        total = ctc_loss_sum(log_probs_BTV, frames_B, batch.letters_BU, batch.counts_B)
        seconds = int(batch.audio.samples_B.sum()) / SAMPLE_RATE
        return StepLoss.of(total, [total, len(frames_B), seconds])


class CtcTask:
    """CTC training on the transcribed subset, as the training loop wants it (distributed/train_loop.py)."""

    def __init__(
        self, corpus: str, model: ModelAt, start: Start, settings: Finetune, choice: Choice, title: str,
        recompute: bool = False,
    ):  # fmt: skip
        self.title = title
        self._settings, self._choice = settings, choice
        train = labelled_subset(model.storage, corpus, settings)
        dev, self._references = spellable(read_transcribed(model.storage, corpus, "dev"))
        texts = spellable(train)[1]
        self._targets = [torch.tensor(letters.encode(text)) for text in texts]
        self._plan = PaddedPlan(
            train.numbers("samples"), settings.batch_seconds, settings.micro_batch_seconds, settings.seed
        )
        card = model.card()
        reader = AudioReader(model.storage, corpus)
        self._train = UtteranceReader(reader, train, card.size.normalize_waveform)
        self._dev = UtteranceReader(AudioReader(model.storage, corpus), dev, card.size.normalize_waveform)
        self._dev_order = np.argsort(dev.numbers("samples"), kind="stable").tolist()
        if start == "pretrained":
            network = HubertCtc.from_pretrained(model.encoder(), settings)
        else:
            network = HubertCtc(card.size, settings=settings, train_conv=True)
        network.encoder.recompute_layers = recompute
        self._width = card.size.dim
        self.module = CtcLoss(network)
        self.optimizer = adamw(self.module.parameters(), settings.betas, settings.eps)
        self.micro_batches = self._plan.micro_batches_per_step

    def load(self, step: int, index: int) -> Spelled:
        rows = self._plan.step(step)[index].rows.tolist()
        audio = self._train.padded(rows)
        targets = [self._targets[row] for row in rows]
        frames_B = torch.tensor([frames_of(int(samples)) for samples in audio.samples_B])
        mask = finetune_mask(
            frames_B, frames_of(audio.wave_BS.shape[1]), self._width, self._choice.mask_prob, self._settings,
            self._settings.seed, step, index,
        )  # fmt: skip
        return Spelled(
            audio,
            nn.utils.rnn.pad_sequence(targets, batch_first=True),
            torch.tensor([len(target) for target in targets]),
            mask,
        )

    def count(self, step: int) -> int:
        """Utterances of the whole step."""
        return sum(len(batch.rows) for batch in self._plan.step(step))

    def learning_rate(self, step: int) -> float:
        settings = self._settings
        return tri_stage_lr(
            step, settings.steps, settings.schedule_shares, self._choice.peak_lr, settings.final_lr_scale
        )

    def before_step(self, step: int) -> None:
        self.module.model.set_step(step, round(self._choice.freeze_share * self._settings.steps))

    def metrics(self, sums: np.ndarray, seconds: float) -> dict[str, float]:
        loss, utterances, audio = sums.tolist()
        return {"loss": loss / utterances, "audio_seconds_per_second": audio / seconds}

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """Greedy word and character error rates on dev, batched by length: padding does not change a result."""
        words, characters = ErrorRate(), ErrorRate()
        for first in range(0, len(self._dev_order), 16):
            rows = self._dev_order[first : first + 16]
            audio = self._dev.padded(rows)
            device = next(self.module.parameters())
            log_probs_BTV, frames_B = self.module.model(audio.wave_BS.to(device), audio.samples_B)
            for k, row in enumerate(rows):
                hypothesis = greedy(log_probs_BTV[k, : frames_B[k]].cpu())
                words += wer.word_errors(self._references[row], hypothesis)
                characters += wer.character_errors(self._references[row], hypothesis)
        return {"dev_wer": words.rate, "dev_cer": characters.rate}

    def weights(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = {name: value.cpu().float() for name, value in self.module.state_dict().items()} | values
        return {name.removeprefix("model."): value.contiguous() for name, value in state.items()}


def finetune(work: Work, start: Start, settings: Finetune, sweep: Sweep) -> dict[str, Any]:
    """Writes the best trial's `model.safetensors` with `model.json`, and `trials.json` with all of them."""
    model = model_at(work.inputs["model"])
    corpus = work.inputs["corpus"].path
    choices = draw_choices(sweep, start)
    first = max(1, settings.steps // 2 ** (sweep.rungs - 1))
    rungs = (*(first * 2**rung for rung in range(sweep.rungs - 1)), settings.steps)  # where ASHA halves the field
    trials = [
        Trial(
            name=f"{number:03d}",
            job=TrainJob(
                factory=partial(
                    CtcTask, corpus, model, start, settings, choice, f"{work.name}/{number:03d}", work.cluster.recompute
                ),
                storage=work.storage,
                folder=work.output.file(f"trials/{number:03d}"),
                steps=settings.steps,
                seed=settings.seed,
                clip_norm=settings.clip_norm,
                checkpoint_steps=rungs[0],
                log_steps=max(1, settings.steps // 20),
                report_steps=rungs,
            ),
        )
        for number, choice in enumerate(choices)
    ]
    # Characters tell trials apart from the first rung on, where nearly every word is still wrong in all of them.
    results = run_trials(trials, "dev_cer", rungs, work.output.file("tune"), work.storage, work.cluster)
    rows = [_row(result, choice, start, settings.steps) for result, choice in zip(results, choices, strict=True)]
    finished = [row for row in rows if not row["stopped_early"]]
    if not finished:
        raise TrainingError(f"{work.name}: no trial reached the end; see {work.output.file('trials')}")
    best = min(finished, key=lambda row: (row["dev_wer"], row["id"]))
    weights = work.storage.read(work.output.file(f"trials/{best['id']}/{layout.MODEL}"))
    work.storage.write(work.output.file(layout.MODEL), weights)
    work.output.write_json(layout.MODEL_CONFIG, ModelCard("ctc", model.card().size, alphabet=letters.ALPHABET))
    work.output.write_json(TRIALS, {"trials": rows, "best": best})
    return {"trials": len(rows), "dev_wer": best["dev_wer"], "best": best["id"]}


def _row(result: TrialResult, choice: Choice, start: Start, steps: int) -> dict[str, Any]:
    last = result.reports[-1]
    return {
        "id": result.name,
        "start": start,
        **msgspec.to_builtins(choice),
        "steps": last["step"],
        "stopped_early": last["step"] < steps,
        "dev_wer": last["dev_wer"],
        "curve": result.reports,
    }


def draw_choices(sweep: Sweep, start: Start) -> list[Choice]:
    """The trials' settings: each range cut into as many strata as there are trials, one draw in each, shuffled.

    A network from random weights has nothing to protect, so it is never frozen.
    """
    rng = np.random.default_rng(sweep.seed)

    def strata(low: float, high: float) -> np.ndarray:
        return rng.permutation(low + (high - low) * (np.arange(sweep.trials) + rng.random(sweep.trials)) / sweep.trials)

    rates = np.exp(strata(*np.log(sweep.peak_lr)))
    freezes, masks = strata(*sweep.freeze_share), strata(*sweep.mask_prob)
    frozen = start == "pretrained"
    return [
        Choice(float(lr), float(freeze) if frozen else 0.0, float(mask))
        for lr, freeze, mask in zip(rates, freezes, masks, strict=True)
    ]
