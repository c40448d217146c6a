"""Reference models that read and write Hugging Face files."""

from .bert import BertConfig as BertConfig
from .bert import BertForSequenceClassification as BertForSequenceClassification
from .bert import BertModel as BertModel
from .huggingface import from_pretrained as from_pretrained
from .huggingface import load_params as load_params
from .huggingface import model_files as model_files
from .huggingface import save_model as save_model
from .huggingface import to_state_dict as to_state_dict
from .planning import plan_model as plan_model
