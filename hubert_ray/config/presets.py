"""Which recipes come with the project? The demo, a longer one for small machines, and the paper's three models."""

from __future__ import annotations

from msgspec import structs

from hubert_ray.config.recipe import (
    Decode,
    EmbeddedCorpus,
    Finetune,
    Iteration,
    Kmeans,
    Layer,
    LibriSpeech,
    Mfcc,
    Pretrain,
    Recipe,
    Segments,
    Sweep,
)
from hubert_ray.config.sizes import BASE, LARGE, TINY, XLARGE

# TINY on two hours of speech has minutes where Base on 960 h has days, so three things differ from the paper, all of them
# settings: unmasked frames count too (the paper's alpha = 2/3; with alpha = 1 the loss falls by a quarter of a bit in 450 steps,
# RESULTS.md), batches are 16 s, and crops are 2 s.
_DEMO_PRETRAIN = Pretrain(
    steps=500,
    peak_lr=2e-3,
    batch_seconds=16.0,
    micro_batch_seconds=8.0,
    max_crop_seconds=2.0,
    crop_lengths=1,
    unmasked_weight=0.5,
    checkpoint_steps=100,
    log_steps=20,
)

_DEMO_KMEANS = Kmeans(clusters=100, max_iterations=15, tolerance=1e-3)

_DEMO_FINETUNE = Finetune(
    label_seconds=600.0,
    steps=140,
    batch_seconds=40.0,
    micro_batch_seconds=20.0,
    channel_mask_prob=0.0,
    layer_drop=0.0,
    activation_dropout=0.0,
    clip_norm=1.0,
    sweep=Sweep(trials=4, peak_lr=(1.5e-3, 5e-3), freeze_share=(0.0, 0.1), mask_prob=(0.0, 0.1)),
    scratch_sweep=Sweep(trials=2, peak_lr=(1.5e-3, 5e-3), freeze_share=(0.0, 0.0), mask_prob=(0.0, 0.1)),
)

DEMO = Recipe(
    name="demo",
    corpus=EmbeddedCorpus(),
    iterations=(
        Iteration(name="iter1", teacher=Mfcc(), kmeans=_DEMO_KMEANS, model=TINY, pretrain=_DEMO_PRETRAIN),
        Iteration(
            name="iter2",
            teacher=Layer(of="iter1", layer=3),
            kmeans=structs.replace(_DEMO_KMEANS, sample_share=0.5),
            model=TINY,
            pretrain=_DEMO_PRETRAIN,
        ),
    ),
    finetune=_DEMO_FINETUNE,
    decode=Decode(ngram_order=3, beam=50, word_scores=(0.0, 1.0)),
)

# The demo with six times the steps.
SMALL = structs.replace(
    DEMO,
    name="small",
    iterations=tuple(
        structs.replace(
            iteration,
            kmeans=structs.replace(iteration.kmeans, sample_share=1.0),
            pretrain=structs.replace(iteration.pretrain, steps=3000, checkpoint_steps=250, log_steps=50),
        )
        for iteration in DEMO.iterations
    ),
    finetune=structs.replace(_DEMO_FINETUNE, steps=500),
)

_LS960 = LibriSpeech(name="librispeech-960h", path="LibriSpeech")
_LL60K = LibriSpeech(name="libri-light-60kh", path="libri-light", segments=Segments())

HUBERT_BASE_LS960 = Recipe(
    name="hubert_base_ls960",
    corpus=_LS960,
    iterations=(
        Iteration(
            name="iter1",
            teacher=Mfcc(),
            kmeans=Kmeans(clusters=100, sample_share=0.1),
            model=BASE,
            pretrain=Pretrain(steps=250_000, peak_lr=5e-4),
        ),
        Iteration(
            name="iter2",
            teacher=Layer(of="iter1", layer=6),
            kmeans=Kmeans(clusters=500, sample_share=0.1),
            model=BASE,
            pretrain=Pretrain(steps=400_000, peak_lr=5e-4),
        ),
    ),
    finetune=Finetune(label_seconds=36_000.0, steps=20_000, sweep=Sweep(trials=8)),
    decode=Decode(),
)

# Large and X-Large are taught by layer 9 of a Base model's second iteration: run hubert_base_ls960 first, on the same
# storage. Their batches are the paper's global ones: 128 x 56.25 s and 256 x 22.5 s.
HUBERT_LARGE_LL60K = Recipe(
    name="hubert_large_ll60k",
    corpus=_LL60K,
    iterations=(
        Iteration(
            name="iter3",
            teacher=Layer(of="hubert_base_ls960/iter2", layer=9),
            kmeans=Kmeans(clusters=500, sample_share=0.002),
            model=LARGE,
            pretrain=Pretrain(
                steps=400_000, peak_lr=1.5e-3, batch_seconds=7200.0, micro_batch_seconds=56.25, clip_norm=1.0
            ),
        ),
    ),
)

HUBERT_XLARGE_LL60K = Recipe(
    name="hubert_xlarge_ll60k",
    corpus=_LL60K,
    iterations=(
        Iteration(
            name="iter3",
            teacher=Layer(of="hubert_base_ls960/iter2", layer=9),
            kmeans=Kmeans(clusters=500, sample_share=0.002),
            model=XLARGE,
            pretrain=Pretrain(
                steps=400_000, peak_lr=3e-3, batch_seconds=5760.0, micro_batch_seconds=22.5, clip_norm=1.0
            ),
        ),
    ),
)

PRESETS: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (DEMO, SMALL, HUBERT_BASE_LS960, HUBERT_LARGE_LL60K, HUBERT_XLARGE_LL60K)
}
