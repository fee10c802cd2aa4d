"""Recipes: typed, strict, and read from YAML with overrides."""

from dkl.config.adversarial import (
    DAJAT,
    GKLAT,
    IKLAT,
    LASAT,
    LBGAT,
    MART,
    PGDAT,
    TRADES,
    AttackSettings,
)
from dkl.config.data import AugmentSettings, DataSettings, GeneratedSettings, ModelSettings
from dkl.config.errors import RecipeError
from dkl.config.evaluation import EvaluationSettings
from dkl.config.loading import (
    list_recipes,
    load_recipe,
    override,
    recipe_text,
    resolved,
    to_yaml,
)
from dkl.config.method import (
    GKLKD,
    IKLKD,
    KD,
    MethodSettings,
    Natural,
    TeacherSettings,
)
from dkl.config.recipe import Recipe
from dkl.config.training import (
    SGD,
    AdamW,
    AveragingSettings,
    Constant,
    Cosine,
    OneCycle,
    OptimizerSettings,
    ScheduleSettings,
    Step,
    TrainingSettings,
    WeightPerturbationSettings,
)
from dkl.config.tuning import Choices, Range, TuningSettings

__all__ = [
    "DAJAT",
    "GKLAT",
    "GKLKD",
    "IKLAT",
    "IKLKD",
    "KD",
    "LASAT",
    "LBGAT",
    "MART",
    "PGDAT",
    "SGD",
    "TRADES",
    "AdamW",
    "AttackSettings",
    "AugmentSettings",
    "AveragingSettings",
    "Choices",
    "Constant",
    "Cosine",
    "DataSettings",
    "EvaluationSettings",
    "GeneratedSettings",
    "MethodSettings",
    "ModelSettings",
    "Natural",
    "OneCycle",
    "OptimizerSettings",
    "Range",
    "Recipe",
    "RecipeError",
    "ScheduleSettings",
    "Step",
    "TeacherSettings",
    "TrainingSettings",
    "TuningSettings",
    "WeightPerturbationSettings",
    "list_recipes",
    "load_recipe",
    "override",
    "recipe_text",
    "resolved",
    "to_yaml",
]
