"""Settings as frozen dataclasses: everything but the gin reader is imported from here."""

from prompt_tuning.config.experiment import FROM_CHECKPOINT as FROM_CHECKPOINT
from prompt_tuning.config.experiment import OFFICIAL_VOCABULARY as OFFICIAL_VOCABULARY
from prompt_tuning.config.experiment import SCRATCH as SCRATCH
from prompt_tuning.config.experiment import TINY as TINY
from prompt_tuning.config.experiment import Activation as Activation
from prompt_tuning.config.experiment import Attending as Attending
from prompt_tuning.config.experiment import DataConfig as DataConfig
from prompt_tuning.config.experiment import EvalConfig as EvalConfig
from prompt_tuning.config.experiment import EvalRun as EvalRun
from prompt_tuning.config.experiment import Experiment as Experiment
from prompt_tuning.config.experiment import InferRun as InferRun
from prompt_tuning.config.experiment import ModelConfig as ModelConfig
from prompt_tuning.config.experiment import PromptConfig as PromptConfig
from prompt_tuning.config.experiment import RankScore as RankScore
from prompt_tuning.config.experiment import TrainConfig as TrainConfig
from prompt_tuning.config.experiment import config_hash as config_hash
from prompt_tuning.config.experiment import flatten as flatten
from prompt_tuning.config.experiment import from_dict as from_dict
from prompt_tuning.config.experiment import to_dict as to_dict
from prompt_tuning.config.parts import BEAM as BEAM
from prompt_tuning.config.parts import ConfigError as ConfigError
from prompt_tuning.config.parts import CorpusConfig as CorpusConfig
from prompt_tuning.config.parts import Decoding as Decoding
from prompt_tuning.config.parts import FileTask as FileTask
from prompt_tuning.config.parts import OptimizerConfig as OptimizerConfig
