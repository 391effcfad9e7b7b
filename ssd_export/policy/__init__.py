"""Cache policies as data; needs no torch. The rules that every backend obeys are defined here and
cited by their numbers elsewhere.

A key is cached after RoPE at its true position, so the order of slots is free: nothing is shifted,
compacted or concatenated. Eviction writes -1 into an integer tensor.

R1  A head owns num_slots slots: key (after RoPE), value, position (RoPE position of the token held,
    -1 = empty), score (float32).
R2  score = sum of the softmax probabilities the slot has received from this head since it was
    written, what the prompt tokens gave each other in prefill included. Grouped-query attention:
    summed over the query heads of the KV head. An eviction ranks first and then multiplies every
    score of the head by score_decay (1: the running sum; 0: only what came since the last
    eviction). Batch rows are independent: the conditional and the unconditional row evict on their
    own.
R3  retention (float32) = +inf if the token is a protected sink (position < num_sinks; num_sinks =
    -1 means the whole prompt), or recent (position > newest - num_recent, newest being the position
    of the token about to be written, so that num_recent - 1 of the held tokens are protected), or
    an image token in a pinned grid column ((position - prompt length) mod the grid's width is a set
    bit of pinned_columns). Otherwise score if by_score, else position.
    With age_quota, older and newer tokens leave in equal numbers: the n held tokens of finite
    retention are split by position into the half that leads and the other. The half that leads is
    the ceil(n / 2) oldest of them where newest is even, the ceil(n / 2) newest where it is odd. A
    token that ranks above r tokens of its half, by the retention so far and R4, gets the retention
    2 r in the half that leads, 2 r + 1 in the other. So an eviction of count tokens takes
    ceil(count / 2) of the half that leads and floor(count / 2) of the other, and where single
    tokens are evicted, the halves take turns.
R4  Of tokens of equal retention the one in the lower slot is evicted first (an arg-min from the
    left).
R5  evict(count): empty the slots of the count tokens of least retention. Changes position only.
R6  A new token goes to the lowest empty slot.
R7  Decode step, in order: a head of a row that has no empty slot does evict(evict_every); write
    key, value, position, score = 0; attend over the non-empty slots, the new token included; add
    the probabilities to score.
R8  Prefill attends densely and causally over the prompt and writes prompt token t to slot t. The
    padding of a prompt shorter than prompt_slots is an empty slot and is never attended. num_slots
    > prompt_slots, so the whole prompt fits; what R3 does not protect of it can be evicted later.
R9  Valid, for each head: num_sinks + max(num_recent - 1, 0) + grid height x pinned columns +
    evict_every <= num_slots (-1 read as prompt_slots), or num_slots >= prompt_slots + image tokens
    (nothing is ever evicted).

Row b writes its first image token at position prompt_length[b]. num_slots = prompt slots + image
slots, and a budget is the mean of the image slots over all KV heads of the model, buffer included,
divided by the number of image tokens.
"""
