(on request_headers
  (if (call $path @/loop@) (then (call $log @looping@) (loop $for_ever (br $for_ever))))
  (call $log @alive@)
  #0)
