"""``medgmae verify``: whether published weights are what their card says."""

from __future__ import annotations

import json
from pathlib import Path

import click

import medgmae
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
@click.option("--card", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write the card, filled in, here.")
@overwrite_option
@json_option
@reports_errors
def verify_command(tag: str, path: Path | None, out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Download the weights of TAG and compare them with their card.

    Hash, names and shapes of all tensors, and whether they fill the model that the card names. --card writes the card
    with size, hash and commit of what was found. Exit code 0: all is as it should be; 1: it is not; 2: wrong usage.
    """
    if out is not None:
        check_name(out)
        refuse_existing(out, overwrite)
    found = medgmae.verify_weights(tag, file=path)
    if out is not None:
        with complete(out, overwrite) as partial:
            partial.write_text(json.dumps(found.card.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if as_json:
        echo_json({**found.facts(), "problems": found.problems, "card": found.card.to_json()})
    else:
        echo_fields({name: shown(value) for name, value in found.facts().items()})
    if not found.passed:
        click.get_current_context().exit(1)
