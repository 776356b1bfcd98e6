(on response_body
  (if (i32.eqz (local.get $eos)) (then (return #1)))
  (call $say @set@ (call $set #1 #0 (local.get $n) @a longer body than it was@))
  #0)
