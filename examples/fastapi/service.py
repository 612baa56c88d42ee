"""A service as many are: a classifier behind FastAPI."""

import os

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(os.environ["SUPER"])
model = AutoModelForSequenceClassification.from_pretrained(os.environ["SUPER"]).eval()
app = FastAPI()


class Texts(BaseModel):
    texts: list[str]


@app.post("/label")
def label(asked: Texts) -> list[str]:
    inputs = tokenizer(asked.texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    return [model.config.id2label[i] for i in logits.argmax(dim=-1).tolist()]
