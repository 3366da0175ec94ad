"""Replaces a file that the source distribution lacks: some fields that every configuration has."""

# no field has its default value, so that a dropped field is noticed
config_common_kwargs = {
    "architectures": ["SomeModel"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "first", 1: "second"},
    "label2id": {"first": 0, "second": 1},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "single_label_classification",
    "return_dict": False,
}
