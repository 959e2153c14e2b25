"""iFlyBot-VLA's stages, small enough to train in a moment, as the command is given them."""

from tests.training.small import weights
from vlaflow.actions.latent import LatentActionModel, LatentConfig, Origin
from vlaflow.policies.provenance import newest_state

STAGES = ("latent", "joint", "fine")
LATENT = ("image_size=32", "patch=4", "width=16", "heads=2", "ffn=32", "spatial=1", "temporal=1", "decoder=1", "code_dim=4")
SMALL = LatentConfig(image_size=32, patch=4, width=16, heads=2, ffn=32, spatial=1, temporal=1, decoder=1, code_dim=4)
BACKBONE = ("image_size=32", "cell=16", "width=32", "depth=2", "heads=2", "ffn=64", "text_bytes=32", "answers=true")
EXPERT = ("width=32", "heads=2", "kv_heads=2", "head_dim=16", "ffn=32")
OFTEN = ("steps=4", "global_batch_size=4", "checkpoint_every=2", "validate_every=100", "optim.warmup_steps=2")


def sets(keys, before=""):
    """KEY=VALUE as command-line words."""
    return [word for key in keys for word in ("--set", before + key)]


def of_latent(before=""):
    return sets((*OFTEN, *(f"model.{k}" for k in LATENT)), before)


def of_joint(before=""):
    shape = [f"policy.backbone.{k}" for k in BACKBONE] + [f"policy.decoder.flow.expert.block.{k}" for k in EXPERT]
    return sets((*OFTEN, *shape), before)


def of_fine(before=""):
    return sets(OFTEN, before)


def places(dataset, out, *more):
    return ["--dataset", str(dataset), "--out", str(out), "--tracker", "none", "--no-calibrate", *map(str, more)]


def demo(dataset, out, *more):
    return ["iflybot.demo", *places(dataset, out), *of_latent("latent."), *of_joint("joint."), *of_fine("fine."), *more]


def joint(dataset, out, latent, *more):
    given = ["--latent", str(latent)] if latent else []
    return ["iflybot.joint", *places(dataset, out, *given), *of_joint(), *more]


def fine(dataset, out, policy, latent, *more):
    return ["iflybot.fine", *places(dataset, out, "--policy", policy, "--latent", latent), *of_fine(), *more]


def write_latent(folder, gap=2, seed=0, **changes):
    """A latent action model that was not trained: its codes are as good as any to learn."""
    config = LatentConfig(**{**vars(SMALL), **changes})
    model = LatentActionModel.create(config, Origin("", "front", 10.0, gap / 10, gap), seed).eval()
    model.save_pretrained(folder)
    return folder


def folder_of(out, stage):
    return out if stage == "fine" else out / stage


def same(a, b):
    """Weights and training state are the same bytes."""
    (step, state_a), (other, state_b) = newest_state(a), newest_state(b)
    files = sorted(f.name for f in state_a.glob("*.safetensors"))
    return (
        step == other
        and weights(a) == weights(b)
        and all((state_a / name).read_bytes() == (state_b / name).read_bytes() for name in files)
    )


def break_down():
    raise RuntimeError("cut")
