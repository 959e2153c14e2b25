"""The fourteen claims, as tests at the size of a laptop: small networks from scratch. ``benchmark`` has the tasks.

Claims of one system share its training. Flows take two solver steps unless the claim is about another number, because ten
steps of unit noise are a weak reference (docs/sampling.md); C1 refines what the calibrated sampler makes. The papers' figures
are from other networks, data and benchmarks; only the direction of an effect can be compared.
"""

from __future__ import annotations

from vlaflow.claims.base import Claim, Effect, Training, TrialArm

STEPS = 1200
TENTH = {"demonstrations": "0.1"}

UNIFIED = Training("asyncvla.demo", steps=STEPS, sampler=True)
SYNCHRONOUS = Training("asyncvla.demo", {"policy.decoder.masks": "synchronous"}, STEPS)
QUARTER = ("--refine", "--sampling", "2", "--share", "0.25")
RATED = Training(
    "asyncvla.rater",
    after="unified",
    sampler=True,
    calibrations={"quarter": QUARTER, "spread-quarter": (*QUARTER, "--doubt", "spread")},
)
RATED_ABSOLUTELY = Training(
    "asyncvla.rater", {"labels": "absolute"}, after="unified", sampler=True, calibrations={"quarter": QUARTER}
)

PLAIN = Training("a1.demo", {"policy.exits": "none"}, STEPS)
EXITS = Training(
    "a1.demo",
    steps=STEPS,
    calibrations={
        **{f"budget-{budget}": ("--exit-budget", budget) for budget in ("1.0", "0.8", "0.4", "0.1")},
        "ten-steps": ("--exit-budget", "0.4", "--sampling", "10"),
        **{f"{start}": ("--exit-budget", "0.4", "--warm-start", start) for start in ("fresh", "anchor", "renoise")},
    },
)

DISCRETE = Training("dfm_vla.demo", steps=STEPS)
MASKED = Training("baselines.masked_diffusion", steps=STEPS)
AUTOREGRESSIVE = Training("baselines.coefficients_ar", steps=STEPS)
FLOW = Training("baselines.flow", steps=STEPS)
ONE_PASS = Training("baselines.oft", steps=STEPS)
ORDERED = Training("dfm_vla.demo_ordered", steps=STEPS)
SLOTS = Training("dfm_vla.demo_slots", steps=STEPS)
BINS = Training("dfm_vla.demo_bins", steps=STEPS)
BY_DECODER = {
    "discrete": DISCRETE,
    "masked": MASKED,
    "autoregressive": AUTOREGRESSIVE,
    "flow": FLOW,
    "one-pass": ONE_PASS,
}

SPLITS = ((14, 2), (16, 0), (15, 1), (12, 4), (8, 8))
FEW_PASSES = ((0, 1), (2, 2), (4, 2))
SHARES = {"tenth": ("0.1", 450), "quarter": ("0.25", 600), "half": ("0.5", 900)}
"""Smaller shares of the demonstrations, with optimiser steps."""

LATENT = Training("iflybot.latent")
QUESTIONS = {"policy.backbone.answers": "true"}


def _tenth(training: Training) -> Training:
    return Training(training.recipe, {**training.settings, **TENTH}, 450)


def _shared(share: str) -> dict[str, Training]:
    """The training of every decoder on a share of the demonstrations."""
    demonstrations, steps = SHARES[share]
    return {
        f"{name}-{share}": Training(each.recipe, {"demonstrations": demonstrations}, steps) for name, each in BY_DECODER.items()
    }


def _by_decoder(share: str) -> dict[str, TrialArm]:
    """One arm per decoder on a share of the demonstrations, and the discrete flow's single pass."""
    return {
        f"{name}, a {share}": TrialArm(f"{training}-{share}", compute)
        for name, training, compute in (
            ("discrete flow", "discrete", "two-stage:14+2"),
            ("discrete flow, one pass", "discrete", "two-stage:0+1"),
            ("masked diffusion", "masked", "dense:16"),
            ("autoregression", "autoregressive", "dense"),
            ("flow", "flow", "dense:2"),
            ("L1", "one-pass", "dense"),
        )
    }


def _joint(*settings: tuple[str, str], vqa: bool = False) -> Training:
    shared = {"vqa.share": "0.3333", **QUESTIONS} if vqa else {}
    return Training("iflybot.joint", {**shared, **dict(settings)}, STEPS, latent="latent", vqa=vqa)


def _finetuned(truncate: bool) -> Training:
    changes = {"policy.decoder.truncate": str(truncate).lower(), "policy.decoder.flow.noise_samples": "1"}
    return Training("iflybot.fine", changes, 1800, after="questions", latent="latent")


CLAIMS = {
    claim.name: claim
    for claim in (
        Claim(
            "C1",
            "AsyncVLA",
            "Regenerating the actions that a rater doubts succeeds more often than regenerating random ones, and that more "
            "often than synchronous flow.",
            "WidowX 70.8 / 62.5 / 47.9",
            {"unified": UNIFIED, "rated": RATED, "rated-absolutely": RATED_ABSOLUTELY},
            {
                "synchronous": TrialArm("rated", "auto"),
                "random": TrialArm("rated", "refine-random:2,share=0.25+auto"),
                "rater": TrialArm("rated", "refine:quarter"),
                "rater of absolute errors": TrialArm("rated-absolutely", "refine:quarter"),
                "spread as doubt": TrialArm("rated", "refine:spread-quarter"),
                "mean of four draws": TrialArm("rated", "mean:4+dense:2"),
                "as published": TrialArm("rated", "refine:10+dense:10"),
            },
            (Effect("rater", "random"), Effect("random", "synchronous"), Effect("rater", "synchronous")),
        ),
        Claim(
            "C2",
            "AsyncVLA",
            "Without unified training, regeneration collapses.",
            "WidowX 47.9 → 7.3",
            {"synchronous": SYNCHRONOUS},
            {
                "synchronous": TrialArm("synchronous", "dense:2"),
                "regenerated": TrialArm("synchronous", "refine-random:2", True),
            },
            (Effect("synchronous", "regenerated"),),
            "The paper regenerates by its rater; here random actions are regenerated, since a rater needs unified training.",
        ),
        Claim(
            "C3",
            "AsyncVLA",
            "Unified training makes better use of the data.",
            "LIBERO-Spatial, part of the data: 95.8 / 86.2",
            {
                "unified": UNIFIED,
                "synchronous": SYNCHRONOUS,
                "unified-tenth": _tenth(UNIFIED),
                "synchronous-tenth": _tenth(SYNCHRONOUS),
            },
            {
                "unified": TrialArm("unified", "dense:2"),
                "synchronous": TrialArm("synchronous", "dense:2"),
                "unified, a tenth": TrialArm("unified-tenth", "dense:2"),
                "synchronous, a tenth": TrialArm("synchronous-tenth", "dense:2"),
            },
            (Effect("unified", "synchronous"), Effect("unified, a tenth", "synchronous, a tenth")),
        ),
        Claim(
            "C4",
            "AsyncVLA",
            "Self-correction is cheap next to a second draw.",
            "rater 2.7 %, regeneration 10.5 % of inference time",
            {"unified": UNIFIED, "rated": RATED},
            {
                "rater": TrialArm("rated", "refine:2"),
                "random": TrialArm("rated", "refine-random:2"),
                "mean of two draws": TrialArm("rated", "mean:2+dense:2"),
                "synchronous": TrialArm("rated", "dense:2"),
            },
            (Effect("rater", "random", "cheaper"), Effect("rater", "mean of two draws", "cheaper")),
            "The paper's first round encodes the prefix again at every step, so its shares cannot be compared.",
        ),
        Claim(
            "C5",
            "A1",
            "Training several exits costs no success at full depth.",
            "LIBERO 96.5 with, 95.8 without",
            {"exits": EXITS, "plain": PLAIN},
            {"with exits": TrialArm("exits", "dense:2"), "without exits": TrialArm("plain", "dense:2")},
            (Effect("with exits", "without exits", "no fewer"),),
        ),
        Claim(
            "C6",
            "A1",
            "Exits save layers at little loss of success.",
            "c = 1.0: −15.6 % compute, 96.6; c = 0.1: −76.6 %, 92.3",
            {"exits": EXITS},
            {
                "full depth": TrialArm("exits", "dense:2"),
                **{f"c = {budget}": TrialArm("exits", f"exit:budget-{budget}") for budget in ("1.0", "0.8", "0.4", "0.1")},
            },
            (
                Effect("c = 0.4", "full depth", "no fewer"),
                Effect("c = 0.1", "full depth", "no fewer"),
                Effect("c = 0.4", "full depth", "cheaper", cost="layer passes"),
                Effect("c = 0.1", "full depth", "cheaper", cost="layer passes"),
            ),
        ),
        Claim(
            "C7",
            "A1",
            "Truncated flow matching saves time where early exit with a full solver at every exit costs time.",
            "37.8 → 10.5 s per episode; 10 steps per exit: 40.9 s",
            {"exits": EXITS},
            {
                "dense, 10 steps": TrialArm("exits", "dense:10"),
                "exits, truncated": TrialArm("exits", "exit:budget-0.4"),
                "exits, 10 steps": TrialArm("exits", "exit:ten-steps"),
                "dense, 2 steps": TrialArm("exits", "dense:2"),
            },
            (
                Effect("exits, truncated", "dense, 10 steps", "cheaper"),
                Effect("dense, 10 steps", "exits, 10 steps", "cheaper"),
                Effect("exits, truncated", "dense, 10 steps", "no fewer"),
            ),
        ),
        Claim(
            "C8",
            "A1",
            "Starting the next exit from the last one's answer succeeds more often than starting from fresh noise.",
            "LIBERO 96.4 / 95.4",
            {"exits": EXITS},
            {
                "warm (anchor)": TrialArm("exits", "exit:anchor"),
                "fresh noise": TrialArm("exits", "exit:fresh"),
                "same noise": TrialArm("exits", "exit:budget-0.4"),
                "warm (renoised)": TrialArm("exits", "exit:renoise"),
            },
            (Effect("warm (anchor)", "fresh noise"),),
            "Nothing is carried over between episodes; the paper's buffer is.",
        ),
        Claim(
            "C9",
            "DFM-VLA",
            "Discrete flow succeeds more often than masked diffusion, and that more often than autoregression, most with "
            "little data.",
            "CALVIN with 10 % of the data: 3.21 / 2.84 / 1.71",
            {**BY_DECODER, **{name: each for share in SHARES for name, each in _shared(share).items()}},
            {
                "discrete flow": TrialArm("discrete", "two-stage:14+2"),
                **{f"discrete flow, {a} + {b}": TrialArm("discrete", f"two-stage:{a}+{b}") for a, b in FEW_PASSES},
                "masked diffusion": TrialArm("masked", "dense:16"),
                "masked diffusion, greedy": TrialArm("masked", "dense:16,temperature=0"),
                "autoregression": TrialArm("autoregressive", "dense"),
                "autoregression, T = 1": TrialArm("autoregressive", "dense:1,temperature=1"),
                "flow, 1 step": TrialArm("flow", "dense:1"),
                "flow, 2 steps": TrialArm("flow", "dense:2"),
                "flow, 10 steps": TrialArm("flow", "dense:10"),
                "L1, one pass": TrialArm("one-pass", "dense"),
                **{name: arm for share in SHARES for name, arm in _by_decoder(share).items()},
            },
            (
                Effect("discrete flow", "masked diffusion"),
                Effect("masked diffusion", "autoregression"),
                Effect("discrete flow, a tenth", "masked diffusion, a tenth"),
                Effect("masked diffusion, a tenth", "autoregression, a tenth"),
            ),
        ),
        Claim(
            "C10",
            "DFM-VLA",
            "Fourteen stochastic and two deterministic steps are the best split of sixteen.",
            "4.44 / 95.7 against 4.37 / 94.8 at 16 + 0",
            {"discrete": DISCRETE, "ordered": ORDERED, "slots": SLOTS},
            {
                **{f"{a} + {b}": TrialArm("discrete", f"two-stage:{a}+{b}") for a, b in (*SPLITS, *FEW_PASSES)},
                **{
                    f"{a} + {b}, ordered by {name}": TrialArm(training, f"two-stage:{a}+{b}")
                    for name, training in (("coefficient", "ordered"), ("slot", "slots"))
                    for a, b in (*SPLITS[:2], *FEW_PASSES)
                },
            },
            tuple(Effect("14 + 2", other) for other in ("16 + 0", "15 + 1", "12 + 4", "8 + 8")),
        ),
        Claim(
            "C11",
            "DFM-VLA",
            "A path guided by the tokens' embeddings succeeds more often than a rate head.",
            "LIBERO 95.7 / 93.5",
            {
                "discrete": DISCRETE,
                "rate-head": Training("dfm_vla.demo_head", steps=STEPS),
                "ordered": ORDERED,
                "slots": SLOTS,
                "bins": BINS,
            },
            {
                "embeddings": TrialArm("discrete", "two-stage:14+2"),
                "rate head": TrialArm("rate-head", "two-stage:14+2"),
                "ordered coefficients": TrialArm("ordered", "two-stage:14+2"),
                "coefficients by slot": TrialArm("slots", "two-stage:14+2"),
                "ordered bins": TrialArm("bins", "two-stage:14+2"),
            },
            (Effect("embeddings", "rate head"),),
            "Embeddings that are learned from scratch order no tokens; other arms have an ordered metric.",
        ),
        Claim(
            "C12",
            "DFM-VLA",
            "The adaptive cache of the prefix keeps success and saves time.",
            "2.41 times as fast as autoregression, 4.40 / 4.42",
            {
                "full-attention": Training("dfm_vla.demo", {"policy.decoder.attention": "full"}, STEPS),
                "autoregressive": AUTOREGRESSIVE,
            },
            {
                "adaptive cache": TrialArm("full-attention", "two-stage:14+2/0.3"),
                "no cache": TrialArm("full-attention", "two-stage:14+2/0"),
                "autoregression": TrialArm("autoregressive", "dense"),
            },
            (
                Effect("adaptive cache", "no cache", "no fewer"),
                Effect("adaptive cache", "no cache", "cheaper"),
                Effect("adaptive cache", "autoregression", "cheaper"),
            ),
            "The paper's prefix has more than a thousand tokens, this one a few dozen, so there is less to save.",
        ),
        Claim(
            "C13",
            "iFlyBot-VLA",
            "Latent actions and FAST tokens as targets of the backbone both raise success.",
            "named, without figures",
            {
                "latent": LATENT,
                "both": _joint(),
                "without-latent": _joint(("policy.decoder.latent_weight", "0")),
                "without-fast": _joint(("policy.decoder.fast_weight", "0")),
            },
            {
                "both targets": TrialArm("both", "dense:2"),
                "no latent targets": TrialArm("without-latent", "dense:2"),
                "no FAST targets": TrialArm("without-fast", "dense:2"),
            },
            (Effect("both targets", "no latent targets"), Effect("both targets", "no FAST targets")),
            "After stage II, without stage III.",
        ),
        Claim(
            "C14",
            "iFlyBot-VLA",
            "Gradient truncation and mixing in questions preserve what the language model knows.",
            "named, without figures",
            {
                "latent": LATENT,
                "questions": Training("iflybot.joint", {"vqa.share": "0.95", **QUESTIONS}, 1000, latent="latent", vqa=True),
                "truncated": _finetuned(True),
                "full-gradients": _finetuned(False),
                "mixed": _joint(vqa=True),
            },
            {
                "truncated": TrialArm("truncated", None),
                "full gradients": TrialArm("full-gradients", None),
                "mixed": TrialArm("mixed", None),
            },
            (Effect("truncated", "full gradients"), Effect("mixed", "truncated")),
            "Answers to held-out questions, by a network that was first trained on questions alone, and by one that was "
            "trained on questions and actions together (mixed).",
        ),
    )
}
