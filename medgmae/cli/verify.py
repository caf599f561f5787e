"""``medgmae verify``: whether published weights are what their card says."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import click

import medgmae
from medgmae.cli.acceptance import example_scans, known_features, run_checks
from medgmae.cli.common import echo_fields, echo_json, reports_errors, shown
from medgmae.cli.files import check_name, complete, refuse_existing
from medgmae.cli.options import complete_name, json_option, overwrite_option


@click.command("verify")
@click.argument("tag", shell_complete=complete_name)
@click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The weights, if they are here already.",
)
@click.option(
    "--scan",
    "scans",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="A scan to run the model on, repeatable; by default the example scans of a checkout.",
)
@click.option("--card", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write the card, filled in, here.")
@overwrite_option
@json_option
@reports_errors
def verify_command(
    tag: str, path: Path | None, scans: tuple[Path, ...], out: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Download the weights of TAG, compare them with their card, and run them on scans.

    Hash, names and shapes of all tensors, and whether they fill the model that the card names; then, if they do, the
    card's own check and the features of the scans, in float32, with seconds and memory (weights/README.md). --card
    writes the card with size, hash, commit and features of what was found. Exit code 0: all is as it should be; 1: it
    is not; 2: wrong usage.
    """
    if out is not None:
        check_name(out)
        refuse_existing(out, overwrite)
    found = medgmae.verify_weights(tag, file=path)
    places = list(scans) or example_scans(found.card)
    checks = run_checks(found, places) if found.passed else []
    card = found.card if found.card.features else replace(found.card, features=known_features(checks))
    if out is not None:
        with complete(out, overwrite) as partial:
            partial.write_text(json.dumps(card.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    facts = found.facts()
    if as_json:
        told = [{**asdict(check), "name": shown(check.name)} for check in checks]
        echo_json({**facts, "problems": found.problems, "card": card.to_json(), "checks": told})
    else:
        why = "there are problems" if not found.passed else "no scans: name them with --scan"
        ran = {check.name: str(check) for check in checks} or {"checks": f"not run: {why}"}
        echo_fields({shown(name): shown(value) for name, value in {**facts, **ran}.items()})
    if not found.passed or any(check.passed is False for check in checks):
        click.get_current_context().exit(1)
