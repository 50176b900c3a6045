"""Two OpenAI-compatible servers under the same requests: latency, throughput, acceptance, and whether to change over.

`requests` and `arrivals` say what is sent and when, `client` sends it and times the answer, `drive` alternates between
the servers, `figures` defines every number, `acceptance` and `usage` read what the engines and their processes count,
`shadow` compares the answers and advises, `mirror` copies live traffic, `report` shows it all.
"""
