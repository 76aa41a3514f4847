"""Print `root;version;gpu` of the torch that the extension will run with.

Found without importing it (fast) and inside pip's build isolation, which hides site-packages from sys.path but not
from sysconfig. `gpu` is cpu, cuda or hip.
"""

import importlib.util
import pathlib
import re
import sys
import sysconfig


def find_torch() -> tuple[pathlib.Path, str, str] | None:
    spec = importlib.util.find_spec("torch")
    roots = list(spec.submodule_search_locations or []) if spec else []
    roots += [f"{sysconfig.get_path(kind)}/torch" for kind in ("platlib", "purelib")]
    for root in map(pathlib.Path, roots):
        version_file = root / "version.py"
        if not version_file.is_file():
            continue
        text = version_file.read_text()
        version = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", text)
        gpu = "cpu"
        for kind in ("cuda", "hip"):
            value = re.search(rf"^{kind}\b[^=\n]*=\s*(.+)$", text, re.MULTILINE)
            if value and value.group(1).strip() not in ("None", "''"):
                gpu = kind
        if version:
            return root, version.group(1), gpu
    return None


if __name__ == "__main__":
    found = find_torch()
    if found is None:
        sys.exit(f"torch is neither importable nor installed in {sysconfig.get_path('platlib')}")
    print(";".join(map(str, found)))
