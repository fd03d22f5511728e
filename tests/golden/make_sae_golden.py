"""Makes the golden tensors of tiny sparse autoencoders: what sae-lens itself computes from folders it wrote itself.

sae-lens cannot be installed beside our transformer-lens 4. Run this in an environment of its own with sae-lens 6.54.12
(it brings transformer-lens 3; install PyTorch's CPU build first):

    PYTHONHASHSEED=0 python tests/golden/make_sae_golden.py

For each autoencoder it writes, beside itself, `sae/<name>/cfg.json` and `sae/<name>/sae_weights.safetensors` as
sae-lens saves them (`sae/gemma_scope/params.npz` in Gemma Scope's layout instead), and `sae/<name>/golden.safetensors`:

    x                        [12, 8]   input vectors
    features                 [12, 20]  sae.encode(x)
    reconstruction           [12, 8]   sae.decode(features)
    features_folded                    the same two after sae.fold_W_dec_norm()
    reconstruction_folded              (missing for the one architecture that refuses to be folded)

The seeds are fixed; the hash seed only fixes the order of the keys in a cfg.json that a training autoencoder wrote.
"""

from pathlib import Path

import numpy as np
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "sae"
N_INPUTS, D_IN, D_SAE, K = 12, 8, 20, 3
MEAN_AND_SPREAD = {  # of the random parameters that are not simply normal with spread 0.5
    "b_enc": (-1.0, 0.7),
    "b_gate": (-1.0, 0.7),
    "r_mag": (0.0, 0.3),
}


def random_inputs() -> torch.Tensor:
    return 0.4 + torch.randn(N_INPUTS, D_IN, generator=torch.Generator().manual_seed(0))


def config_of(config_class, **options):
    metadata = SAEMetadata(model_name="tiny-model", hook_name="blocks.1.hook_resid_post", prepend_bos=True)
    return config_class(d_in=D_IN, d_sae=D_SAE, dtype="float32", device="cpu", metadata=metadata, **options)


@torch.no_grad()
def with_random_parameters(sae: SAE, seed: int) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(sae.named_parameters()):
        mean, spread = MEAN_AND_SPREAD.get(name, (0.0, 0.5))
        parameter.copy_(mean + spread * torch.randn(parameter.shape, generator=generator))
    sae.W_dec.mul_(torch.linspace(0.5, 2.0, D_SAE)[:, None])  # decoder norms far from one
    if hasattr(sae, "threshold"):
        sae.threshold.copy_(0.1 + 3 * torch.rand(D_SAE, generator=generator))
    return sae


@torch.no_grad()
def write_golden(folder: Path, sae: SAE, *, foldable: bool = True) -> None:
    x = random_inputs()
    features = sae.encode(x)
    golden = {"x": x, "features": features, "reconstruction": sae.decode(features)}
    if foldable:
        sae.fold_W_dec_norm()
        golden["features_folded"] = sae.encode(x)
        golden["reconstruction_folded"] = sae.decode(golden["features_folded"])
    save_file({name: tensor.contiguous() for name, tensor in golden.items()}, folder / "golden.safetensors")


def make_inference_folders() -> None:
    standard, topk = (StandardSAE, StandardSAEConfig), (TopKSAE, TopKSAEConfig)
    recipes = {
        "standard": (standard, {"apply_b_dec_to_input": True}),
        "standard_without_input_bias": (standard, {"apply_b_dec_to_input": False}),
        "standard_expected_average_only_in": (standard, {"normalize_activations": "expected_average_only_in"}),
        "standard_constant_norm_rescale": (standard, {"normalize_activations": "constant_norm_rescale"}),
        "standard_layer_norm": (standard, {"normalize_activations": "layer_norm"}),
        "topk": (topk, {"k": K, "rescale_acts_by_decoder_norm": False}),
        "topk_rescaled": (topk, {"k": K, "rescale_acts_by_decoder_norm": True}),
        "jumprelu": ((JumpReLUSAE, JumpReLUSAEConfig), {}),
        "gated": ((GatedSAE, GatedSAEConfig), {}),
    }
    for seed, (name, ((sae_class, config_class), options)) in enumerate(recipes.items(), start=1):
        with_random_parameters(sae_class(config_of(config_class, **options)), seed).save_model(FOLDER / name)
        write_golden(FOLDER / name, SAE.load_from_disk(FOLDER / name), foldable=name != "topk")


def make_exported_batchtopk_folder() -> None:
    folder = FOLDER / "batchtopk_exported"
    options = {"k": K, "rescale_acts_by_decoder_norm": True, "topk_threshold_lr": 0.1}
    sae = with_random_parameters(BatchTopKTrainingSAE(config_of(BatchTopKTrainingSAEConfig, **options)), seed=20)
    for _ in range(50):  # the threshold is a running mean of each batch's smallest activation
        sae.update_topk_threshold(sae.encode(random_inputs()))
    sae.save_inference_model(folder)
    write_golden(folder, SAE.load_from_disk(folder))


def make_gemma_scope_folder() -> None:
    folder = FOLDER / "gemma_scope"
    folder.mkdir(parents=True, exist_ok=True)
    sae = with_random_parameters(JumpReLUSAE(config_of(JumpReLUSAEConfig, apply_b_dec_to_input=False)), seed=30)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in sae.state_dict().items()})
    write_golden(folder, sae)


if __name__ == "__main__":
    make_inference_folders()
    make_exported_batchtopk_folder()
    make_gemma_scope_folder()
