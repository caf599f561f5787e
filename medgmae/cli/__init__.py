"""The command line: ``medgmae list``, ``info``, ``recommend``, ``features``, ``probe``, ``segment``, ``score``,
``slices``, ``reconstruct``, ``latent-map``, ``saliency``, ``gallery``, ``fit``, ``convert``, ``export``, ``verify``,
``project``, ``reconstruct-ct``, ``data``, ``pretrain``, ``finetune``, ``predict``, ``runs``.

Nothing heavy is imported before a command runs, so that ``medgmae --help`` answers at once.
"""

from __future__ import annotations

import io
import sys

import click

import medgmae
from medgmae.cli.convert import convert_command
from medgmae.cli.data import data_group
from medgmae.cli.export import export_command
from medgmae.cli.features import features_command
from medgmae.cli.finetune import finetune_command
from medgmae.cli.fit import fit_command
from medgmae.cli.gallery import gallery_command
from medgmae.cli.latent_map import latent_map_command
from medgmae.cli.models import info_command, list_command, recommend_command
from medgmae.cli.predict import predict_command
from medgmae.cli.pretrain import pretrain_command, runs_command
from medgmae.cli.probe import probe_command
from medgmae.cli.reconstruct import reconstruct_command
from medgmae.cli.saliency import saliency_command
from medgmae.cli.score import score_command
from medgmae.cli.segment import segment_command
from medgmae.cli.slices import slices_command
from medgmae.cli.tomography import project_command, reconstruct_ct_command
from medgmae.cli.verify import verify_command

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(medgmae.__version__, prog_name="medgmae")
@click.option("--debug", is_flag=True, help="Show the Python traceback of an error.")
def main(debug: bool) -> None:
    """3D medical masked autoencoders: models, published weights, features of scans."""
    for stream in (sys.stdout, sys.stderr):  # a name that a terminal cannot show is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


main.add_command(list_command)
main.add_command(info_command)
main.add_command(recommend_command)
main.add_command(features_command)
main.add_command(probe_command)
main.add_command(segment_command)
main.add_command(score_command)
main.add_command(reconstruct_command)
main.add_command(latent_map_command)
main.add_command(saliency_command)
main.add_command(gallery_command)
main.add_command(fit_command)
main.add_command(project_command)
main.add_command(reconstruct_ct_command)
main.add_command(slices_command)
main.add_command(convert_command)
main.add_command(export_command)
main.add_command(verify_command)
main.add_command(data_group)
main.add_command(pretrain_command)
main.add_command(finetune_command)
main.add_command(predict_command)
main.add_command(runs_command)
