"""WHAT does a run compute? The recipe: corpus, iterations of (teacher, codebook, model), fine-tuning, decoding.

Everything here is part of a run's identity: it is hashed into the fingerprints of the artifacts it shapes. HOW a run is
executed (workers, GPUs, ZeRO stage) lives in `cluster.py` and never is. Fields carry their unit in the name or the
comment, and fairseq's name where it has one. Plain immutable structs: importing this file costs no torch and no Ray.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from hubert_ray.config.sizes import ModelSize
from hubert_ray.config.values import (
    Clusters,
    Count,
    Grid,
    Natural,
    NotNegative,
    Positive,
    PositiveShare,
    Probability,
    Settings,
    Share,
    Streams,
    UtteranceSeconds,
)

# --- corpus -----------------------------------------------------------------------------------------------------------


class Checks(Settings, frozen=True, kw_only=True):
    """Which recordings of any source are set aside, each as a row of quarantine.parquet. What cannot be decoded, is not
    finite, or bears an id that was there before always is."""

    min_seconds: Positive = 0.1  # `too_short`; one frame of the model, 0.025 s, at least
    max_seconds: Positive = 120.0  # `too_long`: uncut; a longer recording is for `segments`
    min_sample_rate_hz: Count = 8000  # `sample_rate`: of the stored audio
    max_clipped_share: Share = 0.05  # `clipped`: share of the samples at or beyond full scale
    max_dc_offset: Share = 0.5  # `dc_offset`: the mean, full scale = 1; LibriSpeech has recordings with 0.26
    min_level_db: float = -70.0  # `silent`: power without the mean, dB against full scale (a square wave has 0)
    reject_duplicates: bool = (
        True  # `duplicate_content`: samples that occur before, in any shard; test and dev before train
    )
    require_text: bool = False  # `no_text`: recordings without a transcript; pretraining needs none


class Segments(Settings, frozen=True, kw_only=True):
    """Long recordings cut at their pauses into utterances, by index: audio is stored once, unchanged (data/segments.py).

    Recordings up to `max_seconds` stay whole, with their transcripts; those of longer ones are lost where several pieces come out.
    Voice activity is taken from Libri-light's JSON files where they are, else detected (extra `vad`).
    """

    max_seconds: UtteranceSeconds = 30.0  # no piece is longer
    min_seconds: Positive = 1.0  # shorter pieces are left out
    max_pause_seconds: Positive = 2.0  # a longer pause always parts two pieces and is in neither


class _Corpus(Settings, frozen=True, kw_only=True):
    """What every corpus says of itself."""

    name: str  # identifies the speech
    language: str = ""  # such as "en"; told apart in training on a mix (pretrain.language_alpha), never in reading


class EmbeddedCorpus(_Corpus, frozen=True, kw_only=True, tag="embedded", tag_field="kind"):
    """Synthetic speech made offline by espeak-ng (extra `demo`), with transcripts and phone times."""

    name: str = "embedded"
    language: str = "en"
    train_speakers: Count = 40  # invented voices of this split; no voice and no sentence is in two splits
    dev_speakers: Count = 4
    test_speakers: Count = 4
    utterances_per_speaker: Count = 60  # a sentence each, about 3 s
    shard_mib: Count = 12  # a new audio shard is begun at this size
    seed: Natural = 0
    checks: Checks = Checks()


class _Recordings(_Corpus, frozen=True, kw_only=True):
    """Speech that somebody has.

    A subset, tar or table whose name is or begins with train, dev (also val, valid, validation) or test and then `-`, `_` or `.`
    is of that split; all else is train.
    """

    path: str  # a folder, or an s3://… or gs://… URL
    dev_speakers: tuple[str, ...] = ()  # whole speakers, moved out of train
    test_speakers: tuple[str, ...] = ()
    checks: Checks = Checks()
    segments: Segments | None = None  # None: a recording above checks.max_seconds is set aside


class LibriSpeech(_Recordings, frozen=True, kw_only=True, tag="librispeech", tag_field="kind"):
    """A LibriSpeech-layout tree: `<subset>/<speaker>/<chapter>/<utterance>.flac` with `<chapter>.trans.txt`.

    Libri-light too, whose `<recording>.json` tells the speaker, and whose subsets (small, medium, large) are for training.
    `alignments` is where phone times are, or None: TextGrid or .phn files in the same tree, or CTM files (data/alignments.py).
    """

    alignments: str | None = None
    shard_mib: Count = 256  # a new audio shard is begun at this size


class AudioFolder(_Recordings, frozen=True, kw_only=True, tag="folder", tag_field="kind"):
    """Any tree of .flac, .wav, .ogg, .opus and .mp3 files; `<file>.txt` beside a recording is its transcript.

    `[<subset>/]<speaker>/…/<recording>`. An utterance's id is its path below `path`, without the suffix.
    `alignments` as for LibriSpeech.
    """

    alignments: str | None = None
    shard_mib: Count = 256  # a new audio shard is begun at this size


class AudioTable(_Recordings, frozen=True, kw_only=True, tag="table", tag_field="kind"):
    """A .csv, .tsv (both with a header) or .jsonl file with a row per recording, whose path is relative to the file's folder.

    Only the column of paths must be there. Without ids an utterance is named after its path, without the suffix.
    """

    path_column: str = "path"
    id_column: str = "id"
    speaker_column: str = "speaker"
    split_column: str = "split"
    text_column: str = "text"
    shard_mib: Count = 256  # a new audio shard is begun at this size


class Parquet(_Recordings, frozen=True, kw_only=True, tag="parquet", tag_field="kind"):
    """.parquet files that hold the audio, as Hugging Face's data sets do: `audio: struct<bytes: binary, path: string>`, or binary.

    Only the column of audio must be there. Without ids an utterance is named after its file and row.
    """

    audio_column: str = "audio"
    id_column: str = "id"
    speaker_column: str = "speaker_id"
    text_column: str = "text"
    shard_mib: Count = 256  # a new audio shard is begun at this size


class WebDataset(_Recordings, frozen=True, kw_only=True, tag="webdataset", tag_field="kind"):
    """Plain .tar files with `<key>.<audio suffix>`, `<key>.txt`, `<key>.json` (`text`, `speaker`), used where they lie.

    They are the corpus's shards and must stay: every stage reads the audio from them.
    """


Part = EmbeddedCorpus | LibriSpeech | AudioFolder | AudioTable | Parquet | WebDataset


class Mix(Settings, frozen=True, kw_only=True, tag="mix", tag_field="kind"):
    """Several corpora as one. Their utterances keep their ids and speakers, with the part's name in front: `part/id`.

    How often training hears each part is a setting of training (`pretrain.language_alpha`, `dataset_alpha`), because another
    balance must not cost another reading of the audio; teachers, codebooks and labels see every utterance once.
    """

    name: str
    parts: Annotated[tuple[Part, ...], Meta(min_length=1)]


Corpus = Part | Mix


def parts_of(corpus: Corpus) -> tuple[Part, ...]:
    """The corpora of a mix, or the one that is none."""
    return corpus.parts if isinstance(corpus, Mix) else (corpus,)


# --- one HuBERT iteration ---------------------------------------------------------------------------------------------


class Mfcc(Settings, frozen=True, kw_only=True, tag="mfcc", tag_field="kind"):
    """Teacher of the first iteration: 39-d MFCC with deltas at 100 Hz, exactly as fairseq computes them.

    The paper's product k-means (HuBERT (Hsu et al. 2021) V-E, Table VI) splices frames, and gives each derivative order a codebook
    of its own: `splice = 3` with `kmeans.clusters = [100, 100, 100]` and `kmeans.product = true`. One of the three codebooks alone
    is a plain one on `derivatives = [0]`, `[1]` or `[2]`. Spliced frames take `splice` times the memory while they are clustered.
    """

    frame_rate_hz: ClassVar[int] = 100

    splice: Count = 1  # neighbouring frames side by side, an odd number; at the edges the outermost frame is repeated
    # 13 numbers of each spliced frame for each, one order after the other: 0 = the cepstra themselves, 1 = first deltas, 2 = second
    derivatives: Annotated[tuple[Literal[0, 1, 2], ...], Meta(min_length=1)] = (0, 1, 2)

    @property
    def dim(self) -> int:
        """Numbers per frame."""
        return 13 * self.splice * len(self.derivatives)


class Layer(Settings, frozen=True, kw_only=True, tag="layer", tag_field="kind"):
    """Teacher of a later iteration: the output of a transformer block, after the residual, at 50 Hz."""

    frame_rate_hz: ClassVar[int] = 50

    of: str  # an earlier iteration of this recipe, or "<run>/<iteration>" of another run in the same storage
    layer: Natural  # 1 = first block … N = last; 0 = input of block 1


Teacher = Mfcc | Layer


class Kmeans(Settings, frozen=True, kw_only=True):
    """How the codebook is fitted: Lloyd passes, over a share of the frames first and over all at the end. fairseq's
    `examples/hubert/simple_kmeans/learn_kmeans.py` runs scikit-learn's MiniBatchKMeans on batches of 10,000 frames
    (HuBERT (Hsu et al. 2021) II-A, IV-B).

    Several numbers of clusters make several label streams, which the model learns to predict side by side: a cluster ensemble, or
    with `product` a product codebook (II-C, V-E)."""

    clusters: Clusters | Streams  # n_clusters: 100 for MFCC, 500 for transformer features; [50, 100]: a stream each
    product: bool = False  # each stream has its even part of the features, cut in order, instead of all of them
    # --percent: share of train utterances fitted on, drawn without replacement; fairseq: 0.1 for transformer features
    sample_share: PositiveShare = 1.0
    max_iterations: Count = (
        30  # Lloyd passes at most, over all frames as over each smaller share; fairseq: max_iter 100
    )
    tolerance: NotNegative = 2e-4  # stop when the inertia falls by less than this share in a pass; fairseq: tol 0
    # mini_batch: on batches of 10,000 frames, as fairseq's; why not by default: units/kmeans.py, MiniBatchFit
    algorithm: Literal["lloyd", "mini_batch"] = "lloyd"
    # parallel: k-means‖ in the holders instead of k-means++ on a subsample; why not by default: kmeans_reduce.py, oversample
    seeding: Literal["plus_plus", "parallel"] = "plus_plus"
    # refined k-means++ draws on the seeding subsample, side by side, of which the best is kept; fairseq: n_init 20
    seedings: Count = 4
    restarts: Count = (
        1  # whole fits from other seeds, side by side over the same frames; the one of least inertia is kept
    )
    half_precision: bool = False  # hold the sampled frames as float16: half the memory; sums are float64 either way
    seed: Natural = 0

    @property
    def classes(self) -> tuple[int, ...]:
        """Clusters of each label stream."""
        return (self.clusters,) if isinstance(self.clusters, int) else self.clusters


class Mask(Settings, frozen=True, kw_only=True):
    """Span masking of pretraining (HuBERT (Hsu et al. 2021) II-B; fairseq `data/data_utils.py`, compute_mask_indices)."""

    prob: Probability = (
        0.80  # mask_prob: share of frames that spans would cover without overlap = start probability x length
    )
    length: Count = 10  # mask_length, frames of 20 ms
    min_spans: Natural = 2  # no_mask_min: spans per utterance at least


class Pretrain(Settings, frozen=True, kw_only=True):
    """Masked-prediction training (HuBERT (Hsu et al. 2021) II-B, IV-C; fairseq `examples/hubert/config/pretrain`)."""

    steps: Count  # max_update
    peak_lr: Positive  # lr
    warmup_share: Probability = 0.08  # warmup_updates / max_update; the rest decays linearly to 0
    batch_seconds: Positive = 2800.0  # audio of one optimiser step over all workers (max_tokens x GPUs)
    micro_batch_seconds: Positive = 87.5  # audio of one forward pass; the unit that workers share out
    min_crop_seconds: Positive = 2.0  # min_sample_size: shorter utterances are not trained on
    max_crop_seconds: Positive = 15.625  # max_sample_size
    crop_lengths: Count = 12  # length buckets between the two
    # of a mix of corpora (kind = "mix"): 1 = as long as they are, 0 = languages, or a language's datasets, all heard equally long
    language_alpha: Share = 1.0  # mHuBERT-147: 0.7; share of an epoch ~ hours of the language ** language_alpha
    dataset_alpha: Share = 1.0  # mHuBERT-147: 0.9; share of its language ~ hours of the dataset ** dataset_alpha
    mask: Mask = Mask()
    betas: tuple[Probability, Probability] = (0.9, 0.98)  # adam_betas
    eps: Positive = 1e-6  # adam_eps
    weight_decay: NotNegative = 0.01  # weight_decay, decoupled
    clip_norm: NotNegative = 10.0  # clip_norm
    masked_weight: NotNegative = 1.0  # pred_masked_weight
    unmasked_weight: NotNegative = 0.0  # pred_nomask_weight
    feature_penalty: NotNegative = 10.0  # loss_weights
    checkpoint_steps: Count = 25_000  # save_interval_updates
    log_steps: Count = 200  # log_interval
    seed: Natural = 1337  # seed


class Iteration(Settings, frozen=True, kw_only=True):
    """features from `teacher` -> codebook -> labels -> a model trained from random weights on them."""

    name: str
    teacher: Teacher
    kmeans: Kmeans
    model: ModelSize
    pretrain: Pretrain


# --- recogniser -------------------------------------------------------------------------------------------------------


class Sweep(Settings, frozen=True, kw_only=True):
    """The Ray Tune search over fine-tuning (HuBERT (Hsu et al. 2021) IV-D): each trial is a fine-tuning run with a
    `peak_lr`, a `freeze_share` and a `mask_prob` drawn for it from these ranges; the best on dev is the recogniser."""

    trials: Count = 4  # fine-tuning runs
    peak_lr: tuple[Positive, Positive] = (1e-5, 1e-4)  # log-uniform range
    freeze_share: tuple[Share, Share] = (0.0, 0.5)  # uniform range of freeze_finetune_updates / max_update
    mask_prob: tuple[Probability, Probability] = (
        0.5,
        0.75,
    )  # uniform range of mask_prob of the time masks, as in Mask.prob
    # dev evaluations per trial, each after twice the steps; at each ASHA may stop the half with the worse character error rate
    rungs: Count = 3
    seed: Natural = 0


class Finetune(Settings, frozen=True, kw_only=True):
    """CTC fine-tuning (HuBERT (Hsu et al. 2021) II-E, IV-D; defaults as wav2vec 2.0's 10-minute run, fairseq
    `examples/wav2vec/config/finetuning/base_10m.yaml`). Audio is padded, never cropped. The conv encoder stays frozen."""

    label_seconds: Positive = (
        600.0  # transcribed train audio: at most this much, drawn by seed; 600 = the 10-minute split
    )
    steps: Count = 13_000  # max_update
    batch_seconds: Positive = 1600.0  # padded audio of one optimiser step over all workers
    micro_batch_seconds: Positive = 200.0  # padded audio of one forward pass
    schedule_shares: tuple[Share, Share, Share] = (0.1, 0.4, 0.5)  # phase_ratio: warm-up, hold, decay
    final_lr_scale: Positive = 0.05  # final_lr_scale: learning rate at the end, as a share of the peak
    mask_length: Count = 10  # mask_length of the time masks, frames of 20 ms
    channel_mask_prob: Probability = 0.25  # mask_channel_prob: share of channels that bands would cover without overlap
    channel_mask_length: Count = 64  # mask_channel_length, channels of a band
    layer_drop: Probability = 0.1  # layerdrop, probability that a whole layer is skipped
    dropout: Probability = (
        0.0  # dropout, attention_dropout, dropout_input and final_dropout: one probability for all four
    )
    activation_dropout: Probability = 0.1  # activation_dropout, probability inside the FFN
    betas: tuple[Probability, Probability] = (0.9, 0.98)  # adam_betas
    eps: Positive = 1e-8  # adam_eps
    clip_norm: NotNegative = 0.0  # clip_norm; 0 = off
    sweep: Sweep = Sweep()
    scratch_sweep: Sweep | None = None  # the control from random weights, conv encoder trained too; None = no control
    seed: Natural = 0


class Decode(Settings, frozen=True, kw_only=True):
    """Greedy and n-gram beam search (HuBERT (Hsu et al. 2021) IV-D, eq. 4; fairseq `examples/hubert/config/decode`).

    The two weights are chosen on dev, test is decoded once.
    """

    ngram_order: Count = 4  # words of the longest n-gram
    beam: Count = 500  # beam: hypotheses kept per frame
    beam_threshold: Positive = 100.0  # beamthreshold: those this many nats below the frame's best are dropped
    lm_weights: Grid = (0.5, 1.0, 1.5)  # w1, of the natural logarithm; grid tried on dev
    word_scores: Grid = (-1.0, 0.0, 1.0)  # w2, nats per word; grid tried on dev


class Recipe(Settings, frozen=True, kw_only=True):
    """A whole run."""

    name: str
    corpus: Corpus
    iterations: tuple[Iteration, ...]
    finetune: Finetune | None = None
    decode: Decode | None = None
