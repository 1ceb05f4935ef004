"""A server that speaks OpenAI's protocol: `soundwave serve`.

| module | what it holds |
|---|---|
| settings | the limits of a server |
| errors | errors in OpenAI's form |
| batches | the thread that owns the model, and the one that reads recordings for it; knows nothing of HTTP |
| gate | what is refused before the body of a request is read |
| schemas | the bodies of requests and answers |
| app | the endpoints |
| server | the process: its socket, its signals, its end |
"""
