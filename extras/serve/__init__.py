"""A model behind HTTP, spoken to as OpenAI's API. Needs starlette and uvicorn.

    fields.py    a request's JSON -> what is asked for, every field checked by a table
    worker.py    the one thread that owns the model: texts of all requests are continued together
    answers.py   what the model says -> OpenAI's JSON, whole or as server-sent events
    app.py       routes, who may ask, one request from body to answer
    wire.py      the socket: deadlines, limits, what is no HTTP, the end

In:  a model with its tokenizer, and an open socket. Out: answers until a signal comes.
Does not know how a model is found or loaded.
"""
