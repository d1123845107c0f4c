from .choices import Choices as Choices
from .contrast_pairs import ContrastPairs as ContrastPairs
from .files import Row as Row
from .files import read_rows as read_rows
from .labelled_text import LabelledText as LabelledText
from .row_data import RowData as RowData
from .statements import Statements as Statements
