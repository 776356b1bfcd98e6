(global $paused (mut i32) #0)
(on request_body
  (call $two @body@ (local.get $n) (local.get $eos))
  (if (global.get $paused) (then (return #0)))
  (global.set $paused #1)
  #1)
