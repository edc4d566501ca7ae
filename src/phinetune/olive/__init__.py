"""Microsoft Olive's configuration files, of 0.3 to 0.13, as native workflow values: dictionaries in, dictionaries and notes out.

`translate` is the whole of it; `migrate` writes its result as a commented native file. Nothing behind this package knows Olive, and
nothing here loads a model, opens a data file or asks the network: of the user's disk only a model folder's config.json is read.
"""

from phinetune.olive.eras import Era, detect_era
from phinetune.olive.migrate import migrate
from phinetune.olive.reader import Note
from phinetune.olive.translate import Translation, is_olive, translate

__all__ = ["Era", "Note", "Translation", "detect_era", "is_olive", "migrate", "translate"]
