(global $id (mut i32) #0)
(on configure (drop (call $set_tick_period_milliseconds #1500)) #1)
(on tick
  (if (i32.eqz (global.get $id)) (then (return)))
  (call $say @enter@ (call $set_effective_context (global.get $id)))
  (call $say @resume@ (call $continue_stream #0))
  (global.set $id #0))
(on request_headers (call $log @held@) (global.set $id (local.get $id)) #1)
(on request_body (call $two @body@ (local.get $n) (local.get $eos)) #0)
