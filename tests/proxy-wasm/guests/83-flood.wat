(on request_headers
  (local $i i32)
  (loop $next
    (call $log @flood@)
    (local.set $i (i32.add (local.get $i) #1))
    (br_if $next (i32.lt_u (local.get $i) #1000)))
  #0)
