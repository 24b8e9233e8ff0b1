"""A sparse autoencoder (SAE) and the activation that it reads.

In: the text a user gives for an SAE; a causal LM. Out: the SAE with its site and hash; the activations at the sites as
a forward pass computes them. `resid_post` is the output of a decoder layer, which is what goes into the next one;
`mlp_out` is what the layer's MLP adds to the residual stream. Which module computes it differs between architectures
(Gemma-2's `post_feedforward_layernorm`, Llama's `mlp`): `anatomy.py` finds it.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...cache.errors import reading
from .anatomy import anatomy, decoder_layers
from .npz import read_npz

SiteKind = Literal["resid_post", "mlp_out"]

# These encode every position by itself, from the same activation that they reconstruct. SAELens saves its BatchTopK
# kinds as "jumprelu". Transcoders reconstruct another activation than they read; temporal SAEs look at other positions.
_READABLE_ARCHITECTURES = ("standard", "gated", "topk", "jumprelu")
_READABLE_SITES = (
    "blocks.L.hook_resid_post, blocks.L.hook_resid_pre, blocks.L.hook_mlp_out, model.layers.L or transformer.h.L (with "
    "or without .output) or model.layers.L.post_feedforward_layernorm.output"
)
_LAYER = r"(?:model\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)"
_SITE_SPELLINGS: tuple[tuple[str, SiteKind], ...] = (
    (r"blocks\.(\d+)\.hook_resid_post", "resid_post"),
    (r"blocks\.(\d+)\.hook_mlp_out", "mlp_out"),
    (_LAYER + r"(?:\.output)?", "resid_post"),
    # What these names mean is the same wherever they occur: the last norm before the sum (Gemma-2, OLMo-2; GLM-4).
    (_LAYER + r"\.(?:post_feedforward_layernorm|post_mlp_layernorm)(?:\.output)?", "mlp_out"),
)


@dataclass(frozen=True, order=True)
class Site:
    """Where in a model an SAE reads: a layer (from 0) and a hook."""

    layer: int
    kind: SiteKind

    @property
    def name(self) -> str:
        """The TransformerLens name, as `blocks.25.hook_resid_post`."""
        return f"blocks.{self.layer}.hook_{self.kind}"


@dataclass(frozen=True, eq=False)
class SiteSAE:
    """An SAE in eval mode, without gradients, in its own dtype, and the site that it reads.

    `sha256` covers what defines the features: the weights and every configuration value but device and metadata, so
    the same SAE has the same hash from whichever file format it came. `spec` is what the user wrote.
    """

    site: Site
    sae: Any  # sae_lens.SAE, which takes three seconds to import
    sha256: str
    spec: str

    @property
    def width(self) -> int:
        """The number of features, `m`."""
        return int(self.sae.cfg.d_sae)

    @property
    def d_in(self) -> int:
        """The size of the activation, `d`."""
        return int(self.sae.cfg.d_in)

    @property
    def architecture(self) -> str:
        """SAELens' name of the encoder's kind, as `jumprelu`."""
        return str(self.sae.cfg.architecture())


def parse_site(text: str) -> Site:
    """Reads a site in TransformerLens' spelling or as a Hugging Face module path.

    Raises:
        ValueError: `text` is none of the spellings that are read.
    """
    for pattern, kind in _SITE_SPELLINGS:
        if match := re.fullmatch(pattern, text):
            return Site(int(match[1]), kind)
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", text):
        if int(match[1]) > 0:  # what goes into a layer is what the one before it puts out
            return Site(int(match[1]) - 1, "resid_post")
        raise ValueError(f"expected a site after a layer, found {text!r}, which is before all of them; choose another")
    raise ValueError(f"expected a site as {_READABLE_SITES}, got {text!r}")


def load_sae(spec: str, *, device: torch.device | str = "cpu") -> SiteSAE:
    """Loads an SAE.

    Args:
        spec: one of
            `release:sae_id`, a name in SAELens' list of published SAEs, fetched from the hub;
            a folder that SAELens saved (`cfg.json`, `sae_weights.safetensors`);
            a Gemma Scope file with its site, `path/params.npz@blocks.25.hook_resid_post`.
            `@site` may follow the others too, and must follow a folder whose metadata names no site.
        device: where the SAE is to be.

    Raises:
        ValueError: the SAE cannot be read, has no site or another one than `spec` says, or is not of a kind that
            encodes one activation by itself.
        OSError: there is no such file or folder, or the hub is out of reach.
    """
    where, given = spec, None
    if "@" in spec and not Path(spec).exists():
        where, _, site_text = spec.rpartition("@")
        given = parse_site(site_text)
    if where.endswith(".npz"):
        sae = _read_npz(Path(where))
    elif Path(where).is_dir():
        sae = _read_folder(Path(where))
    elif re.fullmatch(r"[^:]+:[^:]+", where):
        sae = _fetch(*where.split(":"))
    else:
        raise FileNotFoundError(
            f"expected an SAE as release:sae_id, as a folder that SAELens saved or as params.npz@site; "
            f"there is no folder {where!r} and it is not release:sae_id"
        )
    _check_readable(sae, spec)
    site = _site_of(sae, given, spec)
    if _reads_centred(sae):
        _fold_centring(sae)
    sha256 = _hash(sae)
    sae = sae.to(device=device).eval().requires_grad_(False)
    return SiteSAE(site=site, sae=sae, sha256=sha256, spec=spec)


def _read_npz(path: Path) -> Any:
    """Builds a JumpReLU SAE from a Gemma Scope file, which holds float32 arrays and nothing about the model."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    arrays = read_npz(path)
    expected = {"W_enc", "b_enc", "threshold", "W_dec", "b_dec"}
    if set(arrays) != expected:
        raise ValueError(f"expected the arrays {sorted(expected)} in {path}, found {sorted(arrays)}")
    if odd := {key: str(array.dtype) for key, array in arrays.items() if array.dtype != np.float32}:
        raise ValueError(f"expected float32 arrays in {path}, found {odd}")
    if arrays["W_enc"].ndim != 2:
        raise ValueError(f"expected W_enc [d_in, width] in {path}, found shape {list(arrays['W_enc'].shape)}")
    d, m = arrays["W_enc"].shape
    shapes = {"W_enc": (d, m), "b_enc": (m,), "threshold": (m,), "W_dec": (m, d), "b_dec": (d,)}
    if wrong := {key: array.shape for key, array in arrays.items() if array.shape != shapes[key]}:
        raise ValueError(f"expected shapes {shapes} in {path} (from W_enc), found {wrong}")
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d, d_sae=m, dtype="float32", apply_b_dec_to_input=False))
    sae.load_state_dict({key: torch.from_numpy(array) for key, array in arrays.items()})
    return sae


def _read_folder(folder: Path) -> Any:
    from sae_lens import SAE

    for name in ("cfg.json", "sae_weights.safetensors"):
        if not (folder / name).is_file():
            found = sorted(path.name for path in folder.iterdir())
            raise FileNotFoundError(f"expected {name} in {folder}, as SAELens saves an SAE; found {found}")
        (folder / name).open("rb").close()  # of what may not be read safetensors says that it is not there
    with reading(f"SAELens cannot read the SAE in {folder}"), _no_advice():
        return SAE.load_from_disk(folder, device="cpu")


def _fetch(release: str, sae_id: str) -> Any:
    from sae_lens import SAE

    try:
        with _no_advice():
            return SAE.from_pretrained(release, sae_id, device="cpu")
    except OSError as error:
        raise OSError(
            f"cannot fetch SAE {sae_id!r} of release {release!r}: {' '.join(str(error).split())}; "
            f"where the hub is out of reach, give a folder that SAELens saved or params.npz@site"
        ) from error


@contextmanager
def _no_advice() -> Iterator[None]:
    """Without SAELens' warning that tells how to load the model with TransformerLens."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*This SAE has non-empty model_from_pretrained_kwargs", UserWarning)
        yield


def _check_readable(sae: Any, spec: str) -> None:
    """Refuses an SAE that does not map one activation of a Hugging Face model to the features of that position."""
    architecture, normalization = sae.cfg.architecture(), sae.cfg.normalize_activations
    if architecture not in _READABLE_ARCHITECTURES:
        raise ValueError(
            f"expected an SAE of architecture {', '.join(_READABLE_ARCHITECTURES)}, got {architecture!r} from {spec!r}"
        )
    if normalization in ("expected_average_only_in", "covariance_whitening"):
        raise ValueError(
            f"the SAE {spec!r} was trained on rescaled activations ({normalization}) and its weights do not hold the "
            f"scale, so its features would be wrong: fold the scale into the weights and save it again"
        )
    if _reads_centred(sae) and (architecture == "gated" or normalization not in ("none", "layer_norm")):
        raise ValueError(
            f"expected an SAE of a centred residual stream to be standard, topk or jumprelu without scaled "
            f"activations, found {architecture}, {normalization} in {spec!r}; choose another"
        )
    for name, tensor in sae.state_dict().items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise ValueError(f"{bad} of {tensor.numel()} values of {name} are not finite in the SAE {spec!r}")


def _reads_centred(sae: Any) -> bool:
    """Whether TransformerLens took the mean of each position's activation off before the SAE read it (GPT-2's)."""
    return bool((sae.cfg.metadata.model_from_pretrained_kwargs or {}).get("center_writing_weights"))


@torch.no_grad()
def _fold_centring(sae: Any) -> None:
    """Makes such an SAE read Hugging Face's activations: what it does with the centred ones, its encoder does itself.

    With C the projection that takes the mean off, (C x - b_dec) W + b = (x - b_dec) C W + (b + b_dec (C W - W)).
    """
    centred_DF = sae.W_enc - sae.W_enc.mean(0)
    if sae.cfg.apply_b_dec_to_input:
        sae.b_enc += sae.b_dec @ (centred_DF - sae.W_enc)
    sae.W_enc.copy_(centred_DF)


def _site_of(sae: Any, given: Site | None, spec: str) -> Site:
    metadata = sae.cfg.metadata
    if metadata.hook_head_index is not None:
        raise ValueError(f"the SAE {spec!r} reads one attention head, which is not supported")
    if not (hook_name := metadata.hook_name or metadata.hf_hook_name):
        if given is None:
            raise ValueError(f"nothing says which site the SAE {spec!r} reads: add it, as …@blocks.25.hook_resid_post")
        return given
    try:
        site = parse_site(str(hook_name))
    except ValueError as error:
        raise ValueError(f"the SAE {spec!r} reads a site that is not supported: {error}") from error
    if given is not None and given != site:
        raise ValueError(f"the SAE {spec!r} was trained on {site.name}, as its metadata say: leave the @site out")
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
    """Checks that the model has the SAE's layer and activations of its size.

    Raises:
        ValueError: it does not.
    """
    module_at(model, site_sae.site)
    if _reads_centred(site_sae.sae) and not any(isinstance(part, nn.LayerNorm) for part in model.modules()):
        raise ValueError(
            f"the SAE {site_sae.spec!r} reads a centred residual stream: expected a model with LayerNorm, to which the "
            "mean makes no difference, found none in it; choose an SAE that was trained on this model"
        )
    hidden_size = model.config.get_text_config().hidden_size
    if site_sae.d_in != hidden_size:
        raise ValueError(
            f"the SAE {site_sae.spec!r} reads activations of size {site_sae.d_in}, the model has {hidden_size}: "
            f"choose an SAE that was trained on this model"
        )


@contextmanager
def capture_sites(model: PreTrainedModel, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Hands over the activations at `sites` of a forward pass that is run inside the context.

    Gradients flow through what is captured. With activation checkpointing, use the non-reentrant kind (`use_reentrant`
    False): the reentrant one cuts `mlp_out` off from the gradient without a word.

    Args:
        model: a causal LM; of a PEFT model, the model inside.
        sites: which activations to capture.

    Yields:
        A dict that the forward pass fills: `[batch, length, d]` for every site, in the model's dtype.

    Raises:
        ValueError: the model has no such layer, or no module of it computes the site.
    """
    captured: dict[Site, Tensor] = {}

    def hook_for(site: Site) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            captured[site] = output[0] if isinstance(output, tuple) else output

        return hook

    modules = {site: module_at(model, site) for site in sites}
    handles = [module.register_forward_hook(hook_for(site)) for site, module in modules.items()]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def module_at(model: PreTrainedModel, site: Site) -> nn.Module:
    """Returns the module whose output is the activation at `site`."""
    layers = decoder_layers(model)
    if site.layer >= len(layers):
        raise ValueError(f"the site {site.name} is not in the model, whose layers are 0 to {len(layers) - 1}")
    layer, found = layers[site.layer], anatomy(model)
    if site.kind == "resid_post" and found.resid_post[site.layer]:
        return layer
    part = found.mlp_out[site.layer]
    if site.kind == "mlp_out" and part is not None:
        return layer.get_submodule(part)
    wanted = {
        "resid_post": "whose output is the next one's input",
        "mlp_out": "one of whose parts puts out what its MLP adds",
    }[site.kind]
    raise ValueError(
        f"the site {site.name}: expected a layer {wanted}, found {type(layer).__name__}, where it is not so; its parts "
        f"are {', '.join(name for name, _ in layer.named_children())}; choose another site"
    )
