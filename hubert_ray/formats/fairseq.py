"""fairseq's `.pt`, and s3prl's, which holds the same under other keys.

    fairseq   `cfg` (or, older, `args`), `model`, `task_state` with the dictionaries as objects of fairseq's own; we write
              them as text files beside it (`dict.km.txt`, `dict.ltr.txt`, or `dict.km0.txt`, ... for several streams). Those
              fairseq reads where the `.pt` has none, from the folder that its setting `task.data` names:
              `load_model_ensemble_and_task([file], arg_overrides={"data": folder})`
    s3prl     `task_cfg`, `model_cfg`, `model_weight`, `dictionaries_symbols`; pretrained models only

A recogniser nests the body's settings in `cfg.model.w2v_args` and its weights below `w2v_encoder.w2v_model.`. Class ids are
rows of the dictionary, whose first four are specials. Sources: fairseq `models/hubert/`, `data/dictionary.py`; s3prl
`upstream/hubert/convert.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from hubert_ray.data.frames import SAMPLE_RATE, STRIDE
from hubert_ray.formats import names
from hubert_ray.formats.checkpoint import BLANK, Checkpoint, alphabet_of, refuse_unless, size_of
from hubert_ray.formats.names import InteropError, State
from hubert_ray.formats.tensors import fields_of

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # rows that fairseq's dictionaries put first; the first is CTC's blank
_LABEL_RATE = SAMPLE_RATE // STRIDE  # labels a second, as many as frames
_NEVER = -1e4  # bias of letters that only the format knows: no probability is left for them


def holds(content: Mapping[str, Any]) -> bool:
    """Whether this is the content of a `.pt` of fairseq or s3prl."""
    return "model_weight" in content or ("model" in content and ("cfg" in content or "args" in content))


def read(content: Mapping[str, Any], path: Path) -> Checkpoint:
    """The checkpoint in the content of the file at `path`."""
    if "model_weight" in content:
        symbols = content.get("dictionaries_symbols") or ()
        settings = {"model": content.get("model_cfg"), "task": content.get("task_cfg")}
        return _read(content["model_weight"], settings, symbols, path)
    settings = fields_of(content.get("cfg")) or dict.fromkeys(("model", "task"), content.get("args"))
    return _read(content["model"], settings, _stored(content.get("task_state")), path)


def _stored(task_state: Any) -> list[list[str]]:
    """The symbols of the dictionaries that fairseq stored with a task: of the letters, or else of the label streams."""
    state = fields_of(task_state)
    stored = [state["target_dictionary"]] if state.get("target_dictionary") else state.get("dictionaries") or []
    return [list(fields_of(dictionary).get("symbols", ())) for dictionary in stored]


def _read(
    state: Mapping[str, Tensor], settings: dict[str, Any], dictionaries: Sequence[Sequence[str]], path: Path
) -> Checkpoint:
    model, task = fields_of(settings.get("model")), fields_of(settings.get("task"))
    if "w2v_args" in model or "w2v_path" in model:  # a recogniser: the body's settings are nested in its own
        inner = fields_of(model.get("w2v_args"))
        task = {**fields_of(inner.get("task")), **task}
        model = {**(fields_of(inner.get("model")) or inner), **{k: v for k, v in model.items() if v is not None}}
    refuse_unless(path, model.get("activation_fn", "gelu") == "gelu", "activation_fn", model.get("activation_fn"))
    for name in ("pos_conv_depth", "conv_pos_batch_norm"):
        refuse_unless(path, model.get(name, 0) in (0, 1, False) and model.get(name) is not True, name, model.get(name))
    convs = model.get("conv_feature_layers")
    encoder = names.inward(state, "fairseq")
    size = size_of(
        encoder,
        path,
        heads=model.get("encoder_attention_heads"),
        norm_first=model.get("layer_norm_first"),
        normalize=task.get("normalize"),
        conv_grad_scale=model.get("feature_grad_mult"),
        dropout=model.get("dropout"),
        attention_dropout=model.get("attention_dropout"),
        activation_dropout=model.get("activation_dropout"),
        input_dropout=model.get("dropout_input"),
        layer_drop=model.get("encoder_layerdrop"),
    )
    expected = _conv_layers(size.conv_channels)
    refuse_unless(path, convs is None or "".join(convs.split()) in expected, "conv_feature_layers", convs, expected[0])
    labels = task.get("labels") or ()  # a list in HuBERT's tasks, one word in those of wav2vec 2.0
    labels = [labels] if isinstance(labels, str) else [str(label) for label in labels]
    prefix = names.body_prefix(state, "fairseq")
    if prefix:
        if f"{prefix.split('.')[0]}.proj.weight" not in state:
            raise InteropError(f"{path}: found a body below {prefix} without the layer w2v_encoder.proj over it")
        outer = prefix.split(".")[0]
        alphabet = dictionaries[0] if dictionaries else _text_dictionary(path, labels[0] if labels else "ltr")
        head = {"weight": state[f"{outer}.proj.weight"], "bias": state[f"{outer}.proj.bias"]}
        return Checkpoint(size, encoder, letters=head, alphabet=alphabet_of(alphabet, SPECIALS[0], head, path))
    if "label_embs_concat" not in state:  # wav2vec 2.0: its quantizer has no counterpart here
        return Checkpoint(size, encoder)
    codewords, weight, bias = (state[n] for n in ("label_embs_concat", "final_proj.weight", "final_proj.bias"))
    if not dictionaries:
        # One stream may do without names for its clusters; which rows belong to which of several, only their files tell.
        rows = len(codewords) if len(labels) < 2 else None
        dictionaries = [_text_dictionary(path, label, rows) for label in labels or ["km"]]
    classes = tuple(map(tuple, dictionaries))
    if sum(map(len, classes)) != len(codewords):
        raise InteropError(
            f"{path}: found {len(codewords)} codewords but dictionaries of {[len(symbols) for symbols in classes]} entries"
        )
    if len(weight) == codewords.shape[1] and len(classes) > 1:  # one projection for all streams
        weight, bias = weight.repeat(len(classes), 1), bias.repeat(len(classes))
    size = msgspec.structs.replace(size, codeword_dim=codewords.shape[1])
    head = {"projection.weight": weight, "projection.bias": bias, "codewords": codewords}
    return Checkpoint(size, encoder, prediction=head, classes=classes)


def _conv_layers(channels: int) -> tuple[str, str]:
    """fairseq's settings for the convs, Python in a text, in the two ways in which its recipes spell it; without spaces."""
    first = f"[({channels},10,5)]+[({channels},3,2)]*4+"
    return f"{first}[({channels},2,2)]*2", f"{first}[({channels},2,2)]+[({channels},2,2)]"


def _text_dictionary(path: Path, label: str, rows: int | None = None) -> list[str]:
    """fairseq's text form, `symbol count` a line, without the four specials; where it is absent, numbers for `rows` clusters."""
    file = path.parent / f"dict.{label}.txt"
    if file.exists():
        try:
            return [*SPECIALS, *(line.rsplit(" ", 1)[0] for line in file.read_text(encoding="utf-8").splitlines())]
        except ValueError as error:
            raise InteropError(f"{file}: found no text in UTF-8, expected one symbol and its count a line") from error
    if rows is None:
        raise InteropError(f"{path}: holds no dictionary of '{label}'; put its {file.name} into the same folder")
    return [*SPECIALS, *(str(cluster) for cluster in range(rows - len(SPECIALS)))]


def write(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    """Dictionaries go into text files: fairseq reads them from there where the `.pt` holds none of its own objects."""
    settings, state, symbols = _parts(checkpoint)
    content = {
        "args": None,
        "cfg": settings,
        "model": state,
        "task_state": {},
        # fairseq takes a file without a training history for one of its oldest, and looks there for what those held.
        "optimizer_history": [
            {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {"best": None}, "num_updates": 0}
        ],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
    }
    torch.save(content, folder / "model.pt")
    files = [folder / "model.pt"]
    for label, entries in zip(settings["task"]["labels"], symbols, strict=False):  # a body alone has no dictionary
        file = folder / f"dict.{label}.txt"
        file.write_text("".join(f"{symbol} 1\n" for symbol in entries[len(SPECIALS) :]), encoding="utf-8")
        files.append(file)
    return files


def write_s3prl(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    """s3prl's upstreams read pretrained models only."""
    if checkpoint.prediction is None:
        raise InteropError(
            "s3prl: found a model without a prediction head, expected a pretrained HuBERT; export it as hugging_face"
        )
    settings, state, symbols = _parts(checkpoint)
    model = {name: value for name, value in settings["model"].items() if name != "_name"}
    task = {name: settings["task"][name] for name in ("normalize", "sample_rate")}
    content = {"task_cfg": task, "model_cfg": model, "model_weight": state, "dictionaries_symbols": symbols}
    torch.save(content, folder / "model.pt")
    return [folder / "model.pt"]


def _parts(checkpoint: Checkpoint) -> tuple[dict[str, Any], State, list[list[str]]]:
    """(settings, weights, symbols of each dictionary with the four specials)."""
    size = checkpoint.size
    model: dict[str, Any] = {
        "_name": "hubert",
        "label_rate": _LABEL_RATE,  # asked for by its settings; the encoder does not read it
        "extractor_mode": "default" if size.conv_norm == "group" else "layer_norm",
        "conv_feature_layers": _conv_layers(size.conv_channels)[0],
        "conv_bias": size.conv_bias,
        "encoder_layers": size.layers,
        "encoder_embed_dim": size.dim,
        "encoder_ffn_embed_dim": size.ffn_dim,
        "encoder_attention_heads": size.heads,
        "layer_norm_first": size.norm_first,
        "activation_fn": "gelu",
        "conv_pos": size.position_kernel,
        "conv_pos_groups": size.position_groups,
        "final_dim": size.codeword_dim,
        "untie_final_proj": True,
        "feature_grad_mult": size.conv_grad_scale,
        "dropout": size.dropout,
        "attention_dropout": size.attention_dropout,
        "activation_dropout": size.activation_dropout,
        "dropout_input": size.input_dropout,
        "encoder_layerdrop": size.layer_drop,
    }
    streams = len(checkpoint.classes)
    task = {
        "_name": "hubert_pretraining",
        "data": ".",  # where fairseq looks for dictionaries; to be overridden by its user
        "labels": ["km"] if streams < 2 else [f"km{stream}" for stream in range(streams)],
        "label_rate": _LABEL_RATE,
        "normalize": size.normalize_waveform,
        "sample_rate": SAMPLE_RATE,
    }
    state = names.outward(checkpoint.encoder, "fairseq", "legacy")
    if checkpoint.letters is not None:
        state = {f"w2v_encoder.w2v_model.{name}": value for name, value in state.items()}
        symbols = [*SPECIALS, *(symbol for symbol in checkpoint.alphabet if symbol not in (BLANK, *SPECIALS))]
        rows = {BLANK if symbol == "<s>" else symbol: row for row, symbol in enumerate(symbols)}
        weight = checkpoint.letters["weight"].new_zeros(len(symbols), size.dim)
        bias = checkpoint.letters["bias"].new_full((len(symbols),), _NEVER)
        for mine, symbol in enumerate(checkpoint.alphabet):
            if symbol in rows:  # all but a foreign "<s>", whose row is the blank's here
                weight[rows[symbol]] = checkpoint.letters["weight"][mine]
                bias[rows[symbol]] = checkpoint.letters["bias"][mine]
        state |= {"w2v_encoder.proj.weight": weight, "w2v_encoder.proj.bias": bias}
        # fairseq builds the pretraining model first, with a codeword for every symbol, and never uses those again.
        state["w2v_encoder.w2v_model.label_embs_concat"] = weight.new_zeros(len(symbols), size.codeword_dim)
        body = {"model": model, "task": task | {"labels": ["ltr"]}}
        outer = {"w2v_path": "", "w2v_args": body, "normalize": size.normalize_waveform, "data": task["data"]}
        settings = {
            "model": {"_name": "hubert_ctc", **outer},
            "task": task | {"labels": ["ltr"], "label_rate": -1, "fine_tuning": True},
        }
        return settings, state, [symbols]
    settings = {"model": model, "task": task}
    if checkpoint.prediction is None:
        return settings, state, []
    head, tables, symbols_of = checkpoint.prediction, [], []
    for table, entries in zip(
        head["codewords"].split([len(c) for c in checkpoint.classes]), checkpoint.classes, strict=True
    ):
        # fairseq's dictionaries begin with four specials. Where ours have none, their codewords are zeros: a logit of 0,
        # that of an unrelated class.
        missing = 0 if entries[: len(SPECIALS)] == SPECIALS else len(SPECIALS)
        tables.append(torch.cat([table.new_zeros(missing, table.shape[1]), table]))
        symbols_of.append([*SPECIALS[:missing], *entries])
    state |= {"label_embs_concat": torch.cat(tables)}
    state |= {f"final_proj.{ending}": head[f"projection.{ending}"] for ending in ("weight", "bias")}
    return settings, state, symbols_of
