"""An HTTP server that recommends to known users and new ones, with a page to try it.

    slgr serve --workdir=RUN
    slgr serve --workdir=RUN --port=8000 --max_k=50 --batch_users=64
    curl 'http://127.0.0.1:8080/recommend?users=u1&users=u2&k=5'
    curl http://127.0.0.1:8080/recommend --json '{"histories": {"new": ["i7", "i9"]}}'

GET / is the page, GET /health says when every program is compiled (503 until then), what is served
and the limits. /recommend takes users or histories, k, mask_seen, allow and deny; its lists are
those of slgr recommend. Requests of the same few milliseconds are answered together. Errors are
JSON. SIGTERM or Ctrl-C ends it when the requests under way are answered.

It listens on this machine only unless --host says otherwise, and has no authentication.
Needs the extra: pip install 'slgr_jax[serve]'.
"""

from __future__ import annotations

from absl import flags as absl_flags

from slgr_jax import api
from slgr_jax.cli import flags
from slgr_jax.config import ServeConfig

USAGE = __doc__ or ""


def define() -> None:
    """Define the command's flags."""
    absl_flags.DEFINE_string("workdir", None, "directory of a run")
    absl_flags.DEFINE_string("checkpoint", "best", "state to serve: best or last")
    absl_flags.DEFINE_string("data", "", "where the dataset of the run is now, if it was moved")


def main(_: list[str]) -> None:
    """Serve until a signal."""
    config = flags.section_from_flags(ServeConfig)
    from slgr_jax.serving import http_server

    listening = http_server.listen(config.host, config.port)  # before seconds of loading
    given = flags.FLAGS
    run = api.load(given.workdir, given.checkpoint, data=given.data)
    http_server.serve(run, config, listening)


def run() -> None:
    """`slgr serve`."""
    flags.run(
        main,
        usage=USAGE,
        name="slgr serve",
        define=define,
        sections=(ServeConfig,),
        required=("workdir",),
    )
