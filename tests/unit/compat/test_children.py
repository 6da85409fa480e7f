"""The environment of a program's children."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from zrpc.compat.children import SITE, reaching

if TYPE_CHECKING:
    from pathlib import Path


def test_the_folder_comes_first_and_once() -> None:
    once = reaching({"PYTHONPATH": f"/a{os.pathsep}/b", "HOME": "/h"})
    assert once == {"PYTHONPATH": os.pathsep.join([SITE, "/a", "/b"]), "HOME": "/h"}
    assert reaching(once) == once
    assert reaching({}) == {"PYTHONPATH": SITE}


def test_a_hidden_sitecustomize_is_run_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.hidden_was_run = True\n")
    code = "import sys; print(hidden_was_run, 'torch' in sys.modules, 'zrpc' in sys.modules)"
    environment = reaching({**os.environ, "PYTHONPATH": str(tmp_path)})
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "True False False\n"
