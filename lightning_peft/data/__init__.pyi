from .files import Row as Row
from .files import read_rows as read_rows
from .row_data import RowData as RowData
