"""A sparse autoencoder (SAE), and the site in a model whose activations it reads.

In: the name of an SAE; a causal LM. Out: the SAE with its site and hash; the activations at sites, as a forward pass
computes them. `resid_post` is the output of a decoder layer; `mlp_out` is what a layer's MLP adds to the residual
stream. `anatomy.py` finds the module that computes it (Gemma-2: `post_feedforward_layernorm`, Llama: `mlp`).
"""

import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...cache.errors import UserError, reading
from .anatomy import anatomy, decoder_layers, first_tensor

SiteKind = Literal["resid_post", "mlp_out"]

# Architectures that encode each position by itself and reconstruct the activation that they read: neither transcoders
# nor temporal SAEs. SAELens saves BatchTopK SAEs as "jumprelu".
ARCHITECTURES = ("standard", "gated", "topk", "jumprelu")
_SITES = (
    "blocks.L.hook_resid_post, blocks.L.hook_resid_pre, blocks.L.hook_mlp_out, model.layers.L or transformer.h.L (with "
    "or without .output) or model.layers.L.post_feedforward_layernorm.output"
)
_LAYER = r"(?:model\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)"
_SPELLINGS: tuple[tuple[str, SiteKind], ...] = (
    (r"blocks\.(\d+)\.hook_resid_post", "resid_post"),
    (r"blocks\.(\d+)\.hook_mlp_out", "mlp_out"),
    (_LAYER + r"(?:\.output)?", "resid_post"),
    # In every architecture that has them, these are the last norm before the sum (Gemma-2, OLMo-2; GLM-4).
    (_LAYER + r"\.(?:post_feedforward_layernorm|post_mlp_layernorm)(?:\.output)?", "mlp_out"),
)
# The arrays of an npz file may unpack to this many bytes or this multiple of the file's size, whichever is more:
# `np.savez` does not compress, and weights hardly compress.
NPZ_BYTES, NPZ_RATIO = 1 << 26, 4


@dataclass(frozen=True, order=True)
class Site:
    """Where an SAE reads in a model: a layer (from 0) and a hook."""

    layer: int
    kind: SiteKind

    @property
    def name(self) -> str:
        """The TransformerLens name, for example `blocks.25.hook_resid_post`."""
        return f"blocks.{self.layer}.hook_{self.kind}"


@dataclass(frozen=True, eq=False)
class SiteSAE:
    """An SAE in eval mode, without gradients, in its own dtype, and the site that it reads.

    Attributes:
        site: the site.
        sae: a `sae_lens.SAE`.
        sha256: hash of its weights and of every setting but device and metadata; the same for every file format.
        spec: its name, as the user wrote it.
    """

    site: Site
    sae: Any  # importing sae_lens takes three seconds
    sha256: str
    spec: str

    @property
    def width(self) -> int:
        """The number of features, `m`."""
        return int(self.sae.cfg.d_sae)

    @property
    def architecture(self) -> str:
        """SAELens' name of the architecture, for example `jumprelu`."""
        return str(self.sae.cfg.architecture())


def parse_site(text: str) -> Site:
    """Reads a site in TransformerLens' spelling or as a Hugging Face module path.

    Raises:
        UserError: `text` is in neither spelling.
    """
    for pattern, kind in _SPELLINGS:
        if match := re.fullmatch(pattern, text):
            return Site(int(match[1]), kind)
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", text):
        if int(match[1]) > 0:  # a layer's input is the output of the layer before
            return Site(int(match[1]) - 1, "resid_post")
        raise UserError(f"expected a site after a layer, found {text!r}, which is before the first; choose another")
    raise UserError(f"expected a site as {_SITES}, got {text!r}")


def load_sae(spec: str, *, device: torch.device | str = "cpu") -> SiteSAE:
    """Loads an SAE.

    Args:
        spec: one of
            `release:sae_id`, a name in SAELens' list of published SAEs, fetched from the hub;
            a folder that SAELens saved (`cfg.json`, `sae_weights.safetensors`);
            a Gemma Scope file with its site, `path/params.npz@blocks.25.hook_resid_post`.
            `@site` may follow the others too, and must follow a folder whose metadata name no site.
        device: where the SAE goes.

    Raises:
        UserError: the SAE does not exist or cannot be read, the hub is out of reach, its site is unknown or not that of
            `spec`, or it does not encode each activation by itself.
    """
    where, given = spec, None
    if "@" in spec and not Path(spec).exists():
        where, _, site_text = spec.rpartition("@")
        given = parse_site(site_text)
    with warnings.catch_warnings():  # SAELens advises to load the model with TransformerLens
        warnings.filterwarnings("ignore", r"\s*This SAE has non-empty model_from_pretrained_kwargs", UserWarning)
        if where.endswith(".npz"):
            sae = _read_gemma_scope(Path(where))
        elif Path(where).is_dir():
            sae = _read_folder(Path(where))
        elif re.fullmatch(r"[^:]+:[^:]+", where):
            sae = _fetch(*where.split(":"))
        else:
            raise UserError(
                f"expected an SAE as release:sae_id, as a folder that SAELens saved or as params.npz@site; "
                f"there is no folder {where!r} and it is not release:sae_id"
            )
    _check_readable(sae, spec)
    site = _site_of(sae, given, spec)
    if _reads_centred(sae):
        _fold_centring(sae)
    sha256 = _hash(sae)
    return SiteSAE(site, sae.to(device=device).eval().requires_grad_(False), sha256, spec)


def _read_gemma_scope(path: Path) -> Any:
    """Builds a JumpReLU SAE from a Gemma Scope file, which holds float32 arrays alone."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    arrays = read_npz(path)
    d, m = (*arrays.get("W_enc", np.empty(0)).shape, 0, 0)[:2]
    shapes = {"W_enc": (d, m), "b_enc": (m,), "threshold": (m,), "W_dec": (m, d), "b_dec": (d,)}
    expected = {key: f"float32 {list(shape)}" for key, shape in shapes.items()}
    found = {key: f"{array.dtype} {list(array.shape)}" for key, array in arrays.items()}
    if found != expected:
        raise UserError(
            f"expected float32 arrays W_enc [d, m], b_enc [m], threshold [m], W_dec [m, d] and b_dec [d] in {path}, "
            f"found {found}; give a file of Gemma Scope"
        )
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d, d_sae=m, dtype="float32", apply_b_dec_to_input=False))
    sae.load_state_dict({key: torch.from_numpy(array) for key, array in arrays.items()})
    return sae


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Reads the arrays of an npz file, which may be a stranger's: no pickle, and bounded memory.

    Raises:
        UserError: there is no such file, it is not an npz file of plain arrays, or it unpacks to more than allowed.
    """
    if not path.is_file():
        raise UserError(f"expected an SAE's npz file at {path}, found none; check --sae")
    size = path.stat().st_size
    with path.open("rb") as raw, reading(f"expected an npz file of plain arrays, {path} is not one"):
        with zipfile.ZipFile(raw) as archive:
            members = archive.infolist()
        # For these two, zipfile unpacks no more at a time than it is asked for.
        if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
            raise UserError("expected arrays as np.savez writes them, found another compression")
        limit, total = max(NPZ_BYTES, NPZ_RATIO * size), sum(member.file_size for member in members)
        if total > limit:
            raise UserError(f"expected arrays of at most {limit} bytes, found {total} in a file of {size} bytes")
        raw.seek(0)
        with np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        if odd := [key for key, value in arrays.items() if not isinstance(value, np.ndarray)]:
            raise UserError(f"found members that are no arrays: {', '.join(odd[:3])}")
        return arrays


def _read_folder(folder: Path) -> Any:
    from sae_lens import SAE

    for name in ("cfg.json", "sae_weights.safetensors"):
        if not (folder / name).is_file():
            found = sorted(path.name for path in folder.iterdir())
            raise UserError(f"expected {name} in {folder}, as SAELens saves an SAE; found {found}")
        (folder / name).open("rb").close()  # safetensors says of an unreadable file that it does not exist
    with reading(f"SAELens cannot read the SAE in {folder}"):
        return SAE.load_from_disk(folder, device="cpu")


def _fetch(release: str, sae_id: str) -> Any:
    from sae_lens import SAE

    try:
        return SAE.from_pretrained(release, sae_id, device="cpu")
    except (OSError, ValueError) as error:  # a ValueError: SAELens lists no such release or SAE
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(
            f"cannot fetch SAE {sae_id!r} of release {release!r}: {reason}; check the name and the network, or give a "
            "folder that SAELens saved or params.npz@site"
        ) from error


def _check_readable(sae: Any, spec: str) -> None:
    """Refuses an SAE that does not encode each activation of a Hugging Face model by itself, to finite features."""
    architecture, normalization = sae.cfg.architecture(), sae.cfg.normalize_activations
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"expected an SAE of architecture {known}, got {architecture!r} from {spec!r}; choose another")
    if normalization in ("expected_average_only_in", "covariance_whitening"):
        raise UserError(
            f"the SAE {spec!r} was trained on rescaled activations ({normalization}) and its weights do not hold the "
            f"scale, so its features would be wrong: fold the scale into the weights and save it again"
        )
    if _reads_centred(sae) and (architecture == "gated" or normalization not in ("none", "layer_norm")):
        raise UserError(
            f"expected an SAE of a centred residual stream to be standard, topk or jumprelu without scaled "
            f"activations, found {architecture}, {normalization} in {spec!r}; choose another"
        )
    for name, tensor in sae.state_dict().items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise UserError(
                f"{bad} of {tensor.numel()} values of {name} are not finite in the SAE {spec!r}; give another copy"
            )


def _reads_centred(sae: Any) -> bool:
    """Whether TransformerLens subtracted each activation's mean before the SAE read it (GPT-2's)."""
    return bool((sae.cfg.metadata.model_from_pretrained_kwargs or {}).get("center_writing_weights"))


@torch.no_grad()
def _fold_centring(sae: Any) -> None:
    """Folds the centring of activations into the encoder, which then reads Hugging Face's activations.

    With C the projection that subtracts the mean, (C x - b_dec) W + b = (x - b_dec) C W + (b + b_dec (C W - W)).
    """
    centred_DF = sae.W_enc - sae.W_enc.mean(0)
    if sae.cfg.apply_b_dec_to_input:
        sae.b_enc += sae.b_dec @ (centred_DF - sae.W_enc)
    sae.W_enc.copy_(centred_DF)


def _site_of(sae: Any, given: Site | None, spec: str) -> Site:
    metadata = sae.cfg.metadata
    if metadata.hook_head_index is not None:
        raise UserError(f"the SAE {spec!r} reads one attention head, which is not supported; choose another")
    if not (hook_name := metadata.hook_name or metadata.hf_hook_name):
        if given is None:
            raise UserError(f"nothing says which site the SAE {spec!r} reads: add it, as …@blocks.25.hook_resid_post")
        return given
    try:
        site = parse_site(str(hook_name))
    except UserError as error:
        raise UserError(f"the SAE {spec!r} reads a site that is not supported: {error}") from error
    if given is not None and given != site:
        raise UserError(f"the SAE {spec!r} was trained on {site.name}, as its metadata say: leave the @site out")
    return site


def _hash(sae: Any) -> str:
    settings = {field.name: getattr(sae.cfg, field.name) for field in fields(sae.cfg)}
    del settings["device"], settings["metadata"]
    settings["architecture"] = sae.cfg.architecture()
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_fits(site_sae: SiteSAE, model: PreTrainedModel) -> None:
    """Raises UserError unless the model has the SAE's site, with activations of its size."""
    module_at(model, site_sae.site)
    if _reads_centred(site_sae.sae) and not any(isinstance(part, nn.LayerNorm) for part in model.modules()):
        raise UserError(
            f"the SAE {site_sae.spec!r} reads a centred residual stream: expected a model with LayerNorm, which "
            "ignores the mean, found none in it; choose an SAE that was trained on this model"
        )
    size, hidden_size = site_sae.sae.cfg.d_in, model.config.get_text_config().hidden_size
    if size != hidden_size:
        raise UserError(
            f"the SAE {site_sae.spec!r} reads activations of size {size}, the model has {hidden_size}: "
            f"choose an SAE that was trained on this model"
        )


@contextmanager
def capture_sites(model: PreTrainedModel, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Captures the activations at `sites` of a forward pass that runs inside the context.

    Gradients flow through them. Activation checkpointing must be non-reentrant (`use_reentrant=False`): otherwise
    `mlp_out` silently gets no gradient.

    Args:
        model: a causal LM; for a PEFT model, the model inside.
        sites: the sites to read.

    Yields:
        A dict that the forward pass fills: `[batch, length, d]` for every site, in the model's dtype.

    Raises:
        UserError: the model has no such layer, or no module of it computes the site.
    """
    captured: dict[Site, Tensor] = {}

    def hook_for(site: Site) -> Any:
        return lambda module, args, output: captured.update({site: first_tensor(output)})

    with ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(module_at(model, site).register_forward_hook(hook_for(site)))
        yield captured


def module_at(model: PreTrainedModel, site: Site) -> nn.Module:
    """The module whose output is the activation at `site`.

    Raises:
        UserError: there is none.
    """
    layers = decoder_layers(model)
    if site.layer >= len(layers):
        raise UserError(f"the site {site.name} is not in the model, whose layers are 0 to {len(layers) - 1}")
    layer, found = layers[site.layer], anatomy(model)
    if site.kind == "resid_post":
        wanted = "whose output is the next one's input"
        if found.resid_post[site.layer]:
            return layer
    else:
        wanted = "with a part whose output is what its MLP adds"
        if (part := found.mlp_out[site.layer]) is not None:
            return layer.get_submodule(part)
    raise UserError(
        f"the site {site.name}: expected a layer {wanted}, found {type(layer).__name__}, which is built otherwise; its "
        f"parts are {', '.join(name for name, _ in layer.named_children())}; choose another site"
    )
