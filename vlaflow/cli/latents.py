"""``vlaflow data latent-report``; its arguments are in ``data``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlaflow.packages import PAGES, require

if TYPE_CHECKING:
    from vlaflow.cli.data import LatentReport


def latent_report(arguments: LatentReport) -> int:
    """Measure, print a summary and write the page."""
    from numpy import nanmean
    from rich.console import Console

    from vlaflow.actions.latent import LatentActionModel
    from vlaflow.data.hub import title
    from vlaflow.data.lerobot import Dataset
    from vlaflow.evaluation.latent_report import encode_pairs, examples, pixels, probes, usage
    from vlaflow.outputs import require_writable
    from vlaflow.policies.provenance import reading_of
    from vlaflow.reports import latent_actions as page
    from vlaflow.versions import command_line, version_list, versions

    a = arguments
    require(*PAGES)
    dataset = Dataset.open(a.dataset, video=True, reading=a.how.reading() or reading_of(a.model, a.dataset))
    require_writable(a.out)
    model = LatentActionModel.from_pretrained(a.model, a.device)
    console = Console()
    train, held = encode_pairs(model, dataset, a.frames)
    for encoded in (train, held):
        if encoded.pairs.short:
            console.print(encoded.pairs.left_out(), soft_wrap=True, highlight=False)
    book, origin = model.config.book, model.origin
    found = page.LatentMeasurements(
        usage(held.id_MK, book),
        pixels(model, held),
        probes(train, held, book, len(dataset.tasks)),
        examples(model, held),
        dataset.dimension_names("action"),
        {
            "model": f"{a.model}, fingerprint {model.fingerprint()}",
            "trained on": f"data set {origin.dataset}, view '{origin.view}', pairs {origin.gap_s:g} s apart",
            "measured on": f"{title(dataset.root)}, fingerprint {dataset.fingerprint}: {len(held.index_M)} of the "
            f"{len(held.pairs)} pairs of {len(held.pairs.episodes)} held-out episodes; probes learn from {len(train.index_M)}",
            "codes": f"{model.config.codes} of {book}",
            "command": command_line(),
            "versions": version_list(versions()),
        },
    )
    predicted = f" The codes predict {nanmean(found.probes['codes']):.2f} of the actions' variance." if found.probes else ""
    console.print(
        f"{found.usage.used} of {book} entries used, perplexity {found.usage.perplexity:.1f}; the codes reconstruct "
        f"{100 * found.pixels.explained:.0f} % of the change (another pair's: "
        f"{100 * (1 - found.pixels.other / found.pixels.copy) if found.pixels.copy else 0:.0f} %).{predicted}",
        soft_wrap=True,
        highlight=False,
    )
    written = page.write_page(found, f"Latent actions on {title(dataset.root)}", a.out)
    console.print(f"Written: {written}", soft_wrap=True)
    return 0
