"""How does HuBERT read letters? The pretrained encoder under one linear layer, trained with CTC; and what stays frozen.

The conv encoder is frozen for ever, except in the control from random weights (`train_conv=True`). During the first
`freeze_steps` updates the whole encoder is frozen and only the letter head learns; dropout and masks act all the same.

Shapes: B utterances, S samples at 16 kHz, T frames at 50 Hz, D width, V letters + blank.
Sources: HuBERT (Hsu et al. 2021) II-E, IV-D; fairseq `models/hubert/hubert_asr.py`.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor, nn

from hubert_ray.config.recipe import Finetune
from hubert_ray.config.sizes import ModelSize
from hubert_ray.data.frames import RECEPTIVE_FIELD, STRIDE
from hubert_ray.model.dropout import dropout
from hubert_ray.model.hubert import Encoder, valid_frame_counts

LETTERS = 29  # 26 letters, apostrophe, word boundary, and the blank, which is 0


def finetune_size(size: ModelSize, settings: Finetune, train_conv: bool = False) -> ModelSize:
    """The pretraining size with fine-tuning's regularisation in place of its own."""
    return msgspec.structs.replace(
        size,
        dropout=settings.dropout,
        input_dropout=settings.dropout,
        attention_dropout=settings.dropout,
        activation_dropout=settings.activation_dropout,
        layer_drop=settings.layer_drop,
        conv_grad_scale=size.conv_grad_scale if train_conv else 0.0,
    )


class HubertCtc(nn.Module):
    """The recogniser. `settings` overrides the size's dropouts; None keeps `size` as it is, for decoding."""

    def __init__(
        self, size: ModelSize, letters: int = LETTERS, settings: Finetune | None = None, train_conv: bool = False
    ) -> None:
        super().__init__()
        self.size = size if settings is None else finetune_size(size, settings, train_conv)
        self.final_dropout = 0.0 if settings is None else settings.dropout
        self.encoder = Encoder(self.size)
        self.head = nn.Linear(size.dim, letters)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.encoder_frozen = False
        if self.size.conv_grad_scale == 0:
            self.encoder.conv.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, encoder: Encoder, settings: Finetune | None = None, letters: int = LETTERS) -> HubertCtc:
        """A recogniser with a copy of the pretrained encoder."""
        model = cls(encoder.size, letters, settings)
        model.encoder.load_state_dict(encoder.state_dict())
        return model

    def set_step(self, step: int, freeze_steps: int) -> None:
        """Freezes the encoder while `step`, the number of updates already made, is below `freeze_steps`."""
        self.encoder_frozen = step < freeze_steps

    def forward(
        self,
        wave_BS: Tensor,
        samples_B: Tensor,
        time_mask_BT: Tensor | None = None,
        channel_mask_BD: Tensor | None = None,
        kept_layers: list[bool] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(fp32 log_probs_BTV, frames_B). Padding changes nothing; frames beyond frames_B are garbage."""
        kept_layers = self.encoder.draw_kept_layers() if kept_layers is None else kept_layers
        frames_B = valid_frame_counts(samples_B, wave_BS)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            conv_BTC = self.encoder.conv_features(wave_BS, None if frames_B is None else samples_B)
            hidden_BTD = self.encoder.embed(conv_BTC, frames_B, time_mask_BT, channel_mask_BD)
            hidden_BTD = self.encoder.finish(self.encoder.blocks(hidden_BTD, frames_B, kept_layers)[-1])
        logits_BTV = self.head(dropout(hidden_BTD, self.final_dropout, self.training))
        return logits_BTV.float().log_softmax(dim=2), (samples_B - RECEPTIVE_FIELD) // STRIDE + 1
