"""Train one RecBole model on atomic files; `peer_quality.py` runs it where RecBole is installed.

    python recbole_child.py FOLDER MODEL JSON

FOLDER/rows/rows.{train,valid,test}.inter are the parts of click prediction (a `label` column), or
FOLDER/rows/rows.inter all interactions, which RecBole splits by leaving each user's last two out.
Prints one line of JSON: the best validation's result and that of test.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import scipy.sparse
import torch

# RecBole 1.2.1 was written for NumPy 1, for a torch that unpickled anything, and for a SciPy whose
# dok_matrix had a way around its own check of every entry.
for old, new in (("float_", np.float64), ("complex_", np.complex128), ("unicode_", np.str_)):
    if not hasattr(np, old):
        setattr(np, old, new)
_load = torch.load
torch.load = lambda *args, **more: _load(*args, **{**more, "weights_only": False})
scipy.sparse.dok_matrix._update = lambda self, entries: self._dict.update(entries)

from recbole.config import Config  # noqa: E402
from recbole.data import create_dataset, data_preparation  # noqa: E402
from recbole.utils import get_model, get_trainer, init_seed  # noqa: E402


def main() -> None:
    folder, model, options = sys.argv[1:4]
    sys.argv = sys.argv[:1]  # RecBole reads the command line
    config = {
        "data_path": folder,
        "show_progress": False,
        "state": "WARNING",
        **json.loads(options),
    }
    chosen = Config(model=model, dataset="rows", config_dict=config)
    init_seed(chosen["seed"], chosen["reproducibility"])
    train, valid, test = data_preparation(chosen, create_dataset(chosen))
    init_seed(chosen["seed"], chosen["reproducibility"])
    made = get_model(chosen["model"])(chosen, train.dataset).to(chosen["device"])
    trainer = get_trainer(chosen["MODEL_TYPE"], chosen["model"])(chosen, made)
    _, best = trainer.fit(train, valid, saved=True, show_progress=False)
    found = trainer.evaluate(test, load_best_model=True, show_progress=False)
    shown = {"valid": dict(best), "test": dict(found)}
    print(json.dumps({"model": model} | shown, default=float))


if __name__ == "__main__":
    main()
