from .choices import ChoiceTask as ChoiceTask
from .measure import Measure as Measure
from .section import Section as Section
from .split import Split as Split
from .task import Task as Task
from .unit_scores import UnitScores as UnitScores
